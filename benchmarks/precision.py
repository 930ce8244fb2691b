"""Error of a layer in bf16 against float64, by dispatcher and expert-parallel size: EP must not cost precision.

    python -m benchmarks.precision [--json FILE] [--full]

The same bf16 weights, tokens, probabilities and output gradients on 1, 2, 4 and 8 gloo ranks. The oracle is one process
in float64, from those bf16 numbers, in plain torch. Reported is the relative error ‖a − b‖ / ‖b‖ of the output and of
the input gradient over all tokens, the median over several draws; `peer` is the error on one rank. The goal is at most
1.1 times that at EP=8 (a ratio of at least 0.909); the exit status is 1 where `dedup`, or any way with sums in fp32,
misses it. `node` with sums in bf16 rounds them once more, inside the node, and has no goal.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.nn import functional as F

from benchmarks._harness import Median, Missed, row, run
from benchmarks._ranks import on_ranks
from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import contiguous
from moe_dist.ops import native
from moe_dist.parallel.grid import build_grid

EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS = 64, 8, 256, 128, 512
SIZES = (1, 2, 4, 8)
WAYS = {
    "alltoall": ("alltoall", False),
    "dedup": ("dedup", False),
    "dedup, sums in fp32": ("dedup", True),
    "node": ("node", False),
    "node, sums in fp32": ("node", True),
}
GOAL = 1.1


def main() -> None:
    run("precision", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict]:
    missed = []
    alone: dict[str, Median] = {}
    for size in SIZES:
        for way, what, values in on_ranks(size, errors, 20 if full else 5):
            error = Median([1e3 * value for value in values])
            if size == 1:
                alone[what] = error
                continue
            line = row(f"{what}, EP={size}, {way}", error, alone[what], "EP=1", "error / 1000")
            yield line
            if size == max(SIZES) and way != "node" and error > GOAL * alone[what]:
                missed.append(f"{line['case']} {error / alone[what]:.3f} times that at EP=1")
    if missed:
        raise Missed("; ".join(missed))


def errors(draws: int) -> Iterator[tuple[str, str, list[float]]]:
    """(way, output or input gradient, relative errors), one rank's only way being "alltoall"."""
    size = dist.get_world_size()
    grid = build_grid(expert=size, node_size=max(size // 2, 1))
    layer = MoEExperts(ExpertSpec(EXPERTS, HIDDEN, WIDTH), contiguous(EXPERTS, ranks=size), grid, dtype=torch.bfloat16)
    mine = slice(TOKENS * grid.expert_rank // size, TOKENS * (grid.expert_rank + 1) // size)
    ways = WAYS if size > 1 else {"alltoall": WAYS["alltoall"]}
    found: dict[tuple[str, str], list[float]] = {}
    for draw in range(draws):
        problem = drawn(draw)
        with torch.no_grad():
            for name, parameter, seats in layer.expert_parameters():
                parameter.copy_(problem[name][list(seats)])
        wanted = oracle(problem, mine)
        for way, (layer.dispatcher, layer.wide_sums) in ways.items():
            x_TH = problem["x"][mine].clone().requires_grad_()
            y_TH = layer(x_TH, problem["ids"][mine], problem["probs"][mine])
            y_TH.backward(problem["grad"][mine])
            layer.zero_grad(set_to_none=True)
            for what, got in (("output", y_TH.detach()), ("input gradient", x_TH.grad)):
                squares = torch.stack([(got.double() - wanted[what]).square().sum(), wanted[what].square().sum()])
                dist.all_reduce(squares)
                found.setdefault((way, what), []).append(float((squares[0] / squares[1]).sqrt()))
    for (way, what), values in found.items():
        yield way, what, values


def drawn(draw: int) -> dict[str, torch.Tensor]:
    """Everything in bf16 but the ids and the probabilities (fp32)."""
    generator = torch.Generator().manual_seed(draw)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    probs_TE = normal(TOKENS, EXPERTS).softmax(dim=1)
    probs_TK, ids_TK = probs_TE.topk(TOP_K)
    return {
        "x": normal(TOKENS, HIDDEN).bfloat16(),
        "grad": normal(TOKENS, HIDDEN).bfloat16(),
        "ids": ids_TK,
        "probs": probs_TK / probs_TK.sum(dim=1, keepdim=True),
        "gate_up_proj": (normal(EXPERTS, 2 * WIDTH, HIDDEN) * HIDDEN**-0.5).bfloat16(),
        "down_proj": (normal(EXPERTS, HIDDEN, WIDTH) * WIDTH**-0.5).bfloat16(),
    }


def oracle(problem: dict[str, torch.Tensor], mine: slice) -> dict[str, torch.Tensor]:
    """Output and input gradient of these tokens in float64."""
    x_TH = problem["x"][mine].double().requires_grad_()
    ids_TK, probs_TK = problem["ids"][mine], problem["probs"][mine].double()
    y_TH = torch.zeros_like(x_TH)
    for expert in range(EXPERTS):
        token_R, slot_R = torch.nonzero(ids_TK == expert, as_tuple=True)
        gate_RI, up_RI = (x_TH[token_R] @ problem["gate_up_proj"][expert].double().t()).chunk(2, dim=1)
        rows_RH = (F.silu(gate_RI) * up_RI) @ problem["down_proj"][expert].double().t()
        y_TH = y_TH.index_add(0, token_R, rows_RH * probs_TK[token_R, slot_R, None])
    y_TH.backward(problem["grad"][mine].double())
    return {"output": y_TH.detach(), "input gradient": x_TH.grad}


if __name__ == "__main__":
    print(native.status())
    main()
