"""Every dispatcher on every workload against a plain single process: outputs and every gradient, on 2 and 4 ranks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from benchmarks._workloads import DATA, WORKLOADS, Layout, real_routing, workload
from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import contiguous
from moe_dist.parallel.grid import build_grid
from tests.reference import relative_error

HIDDEN, WIDTH = 8, 6
STEPS = 2  # of each workload: the second one is the burst
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
# ranks, ranks a node, dispatcher, parts
WAYS = [
    (2, 2, "alltoall", 1),
    (2, 2, "dedup", 1),
    (2, 1, "node", 1),
    (4, 4, "alltoall", 2),
    (4, 4, "dedup", 1),
    (4, 4, "dedup", 3),
    (4, 2, "node", 1),
    (4, 2, "node", 2),
    (4, 1, "node", 1),
]


@dataclass(frozen=True)
class Case:
    """How a layer sends its tokens; `frozen` experts have no gradient."""

    ranks: int
    node_size: int
    dispatcher: str
    chunks: int
    dtype: torch.dtype
    frozen: int = 0

    @property
    def layout(self) -> Layout:
        return Layout(self.ranks, 10, 3, 12)  # ten experts are not as many on each of four ranks


def routings(case: Case) -> dict[tuple[str, int], list[torch.Tensor]]:
    made = {(name, step): workload(name, case.layout, step=step) for name in WORKLOADS for step in range(STEPS)}
    single = Layout(case.ranks, case.layout.experts, 1, case.layout.tokens)
    return made | {("W7 burst, one expert", 1): workload("W7 burst", single, step=1)}


def numbers(ids: list[torch.Tensor], experts: int, dtype: torch.dtype) -> dict[str, list[torch.Tensor] | torch.Tensor]:
    """Tokens, probabilities and output gradients of every rank, and the experts' weights."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": [normal(len(part), HIDDEN) for part in ids],
        "grad": [normal(len(part), HIDDEN) for part in ids],
        "probs": [torch.rand(part.shape, generator=generator, dtype=torch.float64).to(dtype) for part in ids],
        "gate_up_proj": normal(experts, 2 * WIDTH, HIDDEN),
        "down_proj": normal(experts, HIDDEN, WIDTH),
    }


def steps_on_a_rank(case: Case, all_ids: dict) -> dict:
    """This rank's part of every step: output, gradients of tokens, probabilities, and of experts by global id."""
    grid = build_grid(expert=case.ranks, node_size=case.node_size)
    found = {}
    for key, ids in all_ids.items():
        experts = case.layout.experts
        placement = contiguous(experts, ranks=case.ranks, trainable=range(case.frozen, experts))
        layer = MoEExperts(ExpertSpec(experts, HIDDEN, WIDTH), placement, grid, dtype=case.dtype)
        layer.dispatcher, layer.chunks = case.dispatcher, case.chunks
        data = numbers(ids, experts, case.dtype)
        with torch.no_grad():
            for name, parameter, seats in layer.expert_parameters():
                for seat, expert in enumerate(seats):
                    if expert is not None:
                        parameter[seat] = data[name][expert]
        x, probs, grad = (data[what][grid.expert_rank] for what in ("x", "probs", "grad"))
        y = layer(x.requires_grad_(), ids[grid.expert_rank], probs.requires_grad_())
        y.backward(grad)
        grads = {
            (name, expert): parameter.grad[seat]
            for name, parameter, seats in layer.expert_parameters()
            for seat, expert in enumerate(seats)
            if expert is not None and parameter.grad is not None
        }
        found[key] = {"y": y.detach(), "x": x.grad, "probs": probs.grad, "experts": grads}
    return found


def plain(ids_TK: torch.Tensor, data: dict) -> dict:
    """One process, expert after expert."""
    x, probs, grad = (torch.cat(data[what]) for what in ("x", "probs", "grad"))
    leaves = {what: data[what].clone().requires_grad_() for what in ("gate_up_proj", "down_proj")}
    x, probs = x.detach().requires_grad_(), probs.detach().requires_grad_()
    y = torch.zeros_like(x)
    for expert in range(len(leaves["down_proj"])):
        token_R, slot_R = torch.nonzero(ids_TK == expert, as_tuple=True)
        gate_RI, up_RI = (x[token_R] @ leaves["gate_up_proj"][expert].t()).chunk(2, dim=1)
        rows_RH = (F.silu(gate_RI) * up_RI) @ leaves["down_proj"][expert].t()
        y = y.index_add(0, token_R, rows_RH * probs[token_R, slot_R, None])
    y.backward(grad)
    return {"y": y.detach(), "x": x.grad, "probs": probs.grad} | {name: leaf.grad for name, leaf in leaves.items()}


def check(case: Case, all_ids: dict, results: list[dict]) -> None:
    tolerance = TOLERANCE[case.dtype]
    for key, ids in all_ids.items():
        data = numbers(ids, case.layout.experts, case.dtype)
        wanted = plain(torch.cat(ids), data)
        for what in ("y", "x", "probs"):
            got = torch.cat([result[key][what] for result in results])
            assert relative_error(got, wanted[what]) < tolerance, (key, what)
        for name in ("gate_up_proj", "down_proj"):
            for expert in range(case.layout.experts):
                parts = [r[key]["experts"][name, expert] for r in results if (name, expert) in r[key]["experts"]]
                assert len(parts) == (expert >= case.frozen), (key, name, expert)
                if parts:
                    assert relative_error(parts[0], wanted[name][expert]) < tolerance, (key, name, expert)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("world", "node_size", "dispatcher", "chunks"), WAYS)
def test_every_workload(ranks, world, node_size, dispatcher, chunks, dtype):
    case = Case(world, node_size, dispatcher, chunks, dtype)
    all_ids = routings(case)
    check(case, all_ids, ranks(world, steps_on_a_rank, case, all_ids, timeout=30))


@pytest.mark.parametrize(("world", "node_size", "dispatcher", "chunks"), [(2, 2, "dedup", 2), (4, 2, "node", 1)])
def test_every_workload_with_a_rank_that_is_all_frozen(ranks, world, node_size, dispatcher, chunks):
    case = Case(world, node_size, dispatcher, chunks, torch.float64, frozen=5)
    all_ids = routings(case)
    check(case, all_ids, ranks(world, steps_on_a_rank, case, all_ids, timeout=30))


@dataclass(frozen=True)
class RealCase(Case):
    @property
    def layout(self) -> Layout:
        return Layout(self.ranks, 64, 6, 64)


@pytest.mark.skipif(not (DATA / "intent_routing.npz").is_file(), reason=f"the routing is not in {DATA}")
@pytest.mark.parametrize(("world", "node_size", "dispatcher"), [(2, 2, "dedup"), (4, 4, "dedup"), (4, 2, "node")])
def test_real_routing(ranks, world, node_size, dispatcher):
    case = RealCase(world, node_size, dispatcher, 1, torch.float64)
    ids_LTK, _ = real_routing()
    parts = {("layer", layer): list(ids_LTK[layer, : 64 * world].tensor_split(world)) for layer in (0, 25)}
    check(case, parts, ranks(world, steps_on_a_rank, case, parts, timeout=30))
