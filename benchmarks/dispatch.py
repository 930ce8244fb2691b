"""Time of a layer's step by dispatcher, on the workloads W0 to W7, as a ratio to the plain all-to-all.

    python -m benchmarks.dispatch [--json FILE] [--full]

Forward and backward of our layer on 2 and 4 gloo ranks of one thread each, in two simulated nodes; all ways of sending
take turns on the same weights, tokens and routing, and before they are timed their outputs and input gradients are
compared with those of the plain all-to-all. A step of a workload that changes (W6, W7) is another one each time, the
same for all. "overlap" is a block with a shared expert that computes while the tokens travel, against the same block
without overlap. Here gloo copies rows through memory, on the processors that compute, and there is no network between
the nodes: what would cross it is in `wire` and `wire_model`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from benchmarks._harness import Median, Missed, row, run
from benchmarks._ranks import on_ranks
from benchmarks._workloads import WORKLOADS, Layout, workload
from moe_dist.models.beside import compute_shared_experts_beside
from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import contiguous
from moe_dist.ops import native
from moe_dist.parallel.grid import build_grid

EXPERTS, TOP_K, HIDDEN, WIDTH = 64, 8, 512, 256
TOKENS = 2048  # of all ranks
DTYPE, TOLERANCE = torch.bfloat16, 2e-2
SECONDS, SECONDS_FULL, ROUNDS = 3.0, 20.0, (5, 40)


@dataclass(frozen=True)
class Way:
    dispatcher: str
    chunks: int = 1
    overlap: bool = False

    def __str__(self) -> str:
        return self.dispatcher + f", {self.chunks} parts" * (self.chunks > 1) + ", overlap" * self.overlap


PLAIN = Way("alltoall")
WAYS = (PLAIN, Way("dedup"), Way("dedup", chunks=2), Way("node"), Way("node", chunks=2))
SHARED_WAYS = tuple(Way(name, overlap=overlap) for name in ("dedup", "node") for overlap in (False, True))
SHARED_WIDTH = 2 * TOP_K * WIDTH // 4  # of the shared expert: half of what a token computes in the routed ones


class Block(nn.Module):
    """Routed experts and, where wanted, a shared one, called as transformers' blocks do."""

    def __init__(self, experts: MoEExperts, *, shared: bool):
        super().__init__()
        self.experts = experts
        self.shared_experts = Shared() if shared else None
        compute_shared_experts_beside(self)
        self.beside = experts.beside

    def forward(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, probs_TK: torch.Tensor) -> torch.Tensor:
        routed_TH = self.experts(x_TH, ids_TK, probs_TK)
        return routed_TH if self.shared_experts is None else routed_TH + self.shared_experts(x_TH)

    def take(self, way: Way) -> None:
        self.experts.dispatcher, self.experts.chunks = way.dispatcher, way.chunks
        self.experts.beside = self.beside if way.overlap else None


class Shared(nn.Module):
    """A SwiGLU, the same on every rank."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(HIDDEN, 2 * SHARED_WIDTH, bias=False, dtype=DTYPE)
        self.outer = nn.Linear(SHARED_WIDTH, HIDDEN, bias=False, dtype=DTYPE)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        gate_TI, up_TI = self.inner(x_TH).chunk(2, dim=1)
        return self.outer(F.silu(gate_TI) * up_TI)


def main() -> None:
    run("dispatch", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict | str]:
    for ranks in (2, 4):
        yield from on_ranks(ranks, measure, SECONDS_FULL if full else SECONDS)


def measure(seconds: float) -> Iterator[dict]:
    ranks = dist.get_world_size()
    block = Block(experts_on(ranks), shared=False)
    for name in WORKLOADS:
        plain, *others = measured(name, block, WAYS, seconds)
        for way, median in zip(WAYS[1:], others, strict=True):
            yield row(f"{name}, {ranks} ranks, {way}", median, plain, str(PLAIN))
    block = Block(experts_on(ranks), shared=True)
    medians = dict(zip(SHARED_WAYS, measured("W0 balanced", block, SHARED_WAYS, 2 * seconds), strict=True))
    for way in SHARED_WAYS:
        if way.overlap:
            without = Way(way.dispatcher)
            case = f"W0 balanced and a shared expert, {ranks} ranks, {way}"
            yield row(case, medians[way], medians[without], f"{without}, no overlap")


def measured(name: str, block: Block, ways: Sequence[Way], seconds: float) -> list[Median]:
    """Time of each way's step, once all have been found to compute what the first one does."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    layout = Layout(ranks, EXPERTS, TOP_K, TOKENS // ranks)
    batches = [batch(name, layout, step, rank) for step in range(2)]
    wanted = answer(block, ways[0], batches[1])
    for way in ways[1:]:
        compare(way, name, answer(block, way, batches[1]), wanted)
    return take_turns(block, ways, batches, seconds)


def experts_on(ranks: int) -> MoEExperts:
    torch.manual_seed(0)
    grid = build_grid(expert=ranks, node_size=ranks // 2)
    experts = MoEExperts(ExpertSpec(EXPERTS, HIDDEN, WIDTH), contiguous(EXPERTS, ranks=ranks), grid, dtype=DTYPE)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return experts


def batch(name: str, layout: Layout, step: int, rank: int) -> tuple[torch.Tensor, ...]:
    """This rank's tokens, their gradients, experts and probabilities."""
    ids_TK = workload(name, layout, step=step)[rank]
    generator = torch.Generator().manual_seed(100 * step + rank)
    x_TH, grad_TH = torch.randn(2, len(ids_TK), HIDDEN, generator=generator).to(DTYPE)
    probs_TK = torch.rand(ids_TK.shape, generator=generator).softmax(dim=1)
    return x_TH.requires_grad_(), grad_TH, ids_TK, probs_TK.requires_grad_()


def answer(block: Block, way: Way, one: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    x_TH, grad_TH, ids_TK, probs_TK = one
    block.take(way)
    y_TH = block(x_TH, ids_TK, probs_TK)
    y_TH.backward(grad_TH)
    found = {"output": y_TH.detach(), "input gradient": x_TH.grad, "probabilities' gradient": probs_TK.grad}
    x_TH.grad = probs_TK.grad = None
    block.zero_grad(set_to_none=True)
    return found


def compare(way: Way, name: str, got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raises `Missed` on every rank where any rank's result is another one. Collective."""
    for what, tensor in wanted.items():
        error, size = (got[what].double() - tensor.double()).square().sum(), tensor.double().square().sum()
        squares = torch.stack([error, size])
        dist.all_reduce(squares)
        if not squares[0] <= TOLERANCE**2 * squares[1]:
            raise Missed(f"{way}, {name}: {what} differs from that of the first way")


def take_turns(
    block: Block, ways: Sequence[Way], batches: list[tuple[torch.Tensor, ...]], seconds: float
) -> list[Median]:
    """Milliseconds of each way's step, until the last rank is done; a round is every way on the same batch."""
    times: list[list[float]] = [[] for _ in ways]
    start = time.perf_counter()
    for turn in range(ROUNDS[1]):
        order = list(zip(ways, times, strict=True))
        for way, series in order if turn % 2 == 0 else reversed(order):
            dist.barrier()
            begin = time.perf_counter()
            answer(block, way, batches[turn % len(batches)])
            dist.barrier()
            series.append(1e3 * (time.perf_counter() - begin))
        enough = torch.tensor(int(turn + 1 >= ROUNDS[0] and time.perf_counter() - start > seconds))
        dist.broadcast(enough, 0)
        if enough:
            break
    return [Median(series) for series in times]


if __name__ == "__main__":
    print(native.status())
    main()
