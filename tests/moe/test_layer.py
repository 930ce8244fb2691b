"""The MoE layer at any expert-parallel size against a plain loop over tokens: outputs and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts, drop_over_capacity
from moe_dist.moe.placement import balance, contiguous, from_lists
from moe_dist.parallel.grid import Grid, build_grid
from tests.reference import plain_experts, relative_error

HIDDEN, WIDTH, TOP_K = 8, 6, 3


@dataclass(frozen=True)
class Case:
    """One problem: tokens of each rank (uneven, zero allowed), experts, and which of them train."""

    experts: int = 7
    tokens: tuple[int, ...] = (9, 5, 0, 12)
    trainable: tuple[int, ...] | None = None
    bias: bool = False
    recompute: bool = False
    hidden_needs_grad: bool = True
    reverse_placement: bool = False
    spare: int = 0  # seats a rank for copies of frozen experts
    only_experts: tuple[int, ...] | None = None  # route to these alone
    masked: bool = False  # every third token is padding
    dtype: torch.dtype = torch.float64
    way: str = "auto"
    node_size: int | None = None  # ranks a node; all on one when absent
    chunks: int = 1
    wide_sums: bool = False


def problem(case: Case):
    generator = torch.Generator().manual_seed(7)
    tokens = sum(case.tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    allowed = torch.tensor(case.only_experts if case.only_experts is not None else range(case.experts))
    picks = torch.rand(tokens, len(allowed), generator=generator).argsort(dim=1)[:, :TOP_K]
    weights = {
        "gate_up_proj": normal(case.experts, 2 * WIDTH, HIDDEN),
        "down_proj": normal(case.experts, HIDDEN, WIDTH),
    }
    if case.bias:
        weights |= {
            "gate_up_proj_bias": normal(case.experts, 2 * WIDTH),
            "down_proj_bias": normal(case.experts, HIDDEN),
        }
    mask_T = torch.arange(tokens) % 3 != 0 if case.masked else None
    return {
        "x": normal(tokens, HIDDEN),
        "ids": allowed[picks],
        "probs": torch.rand(picks.shape, generator=generator, dtype=torch.float64).to(case.dtype),
        "grad": normal(tokens, HIDDEN),
        "weights": weights,
        "mask": mask_T,
    }


def layer_on_a_rank(case: Case, expert: int) -> dict:
    """Outputs and gradients of this rank's part, expert gradients by global id."""
    grid = build_grid(expert=expert, node_size=case.node_size)
    data = problem(case)
    train = range(case.experts) if case.trainable is None else case.trainable
    placement = contiguous(case.experts, ranks=expert, trainable=train)
    if case.reverse_placement:
        lists = [list(reversed(held)) for held in reversed(placement.ranks)]
        placement = from_lists(lists, num_experts=case.experts, trainable=train)
    if case.spare:
        load_E = [1.0 + (3 * expert_id) % 5 for expert_id in range(case.experts)]
        lists = balance(load_E, ranks=expert, trainable=train, spare=case.spare)
        given = {"load_E": load_E, "ranks_per_node": grid.node_size}
        placement = from_lists(lists, num_experts=case.experts, trainable=train, **given)
    layer = MoEExperts(ExpertSpec(case.experts, HIDDEN, WIDTH, bias=case.bias), placement, grid, dtype=case.dtype)
    layer.recompute = case.recompute
    layer.dispatcher, layer.chunks, layer.wide_sums = case.way, case.chunks, case.wide_sums
    with torch.no_grad():
        for name, parameter, seats in layer.expert_parameters():
            for seat, expert_id in enumerate(seats):
                if expert_id is not None:
                    parameter[seat] = data["weights"][name][expert_id]

    # Deal the tokens of the case's ranks over the ranks that there are.
    stops = torch.tensor(case.tokens).cumsum(0).tolist()
    start = stops[grid.rank - 1] if grid.rank else 0
    stop = stops[grid.rank] if grid.rank < grid.world - 1 else stops[-1]
    mine = slice(start, stop)
    x = data["x"][mine].clone().requires_grad_(case.hidden_needs_grad)
    probs = data["probs"][mine].clone().requires_grad_(case.hidden_needs_grad)
    if data["mask"] is not None:
        layer.token_mask_T = data["mask"][mine]
    y = layer(x, data["ids"][mine], probs)
    if y.requires_grad:
        y.backward(data["grad"][mine])
    grads = {}
    for name, parameter, seats in layer.expert_parameters():
        for seat, expert_id in enumerate(seats):
            if parameter.grad is not None and expert_id is None:
                assert not parameter.grad[seat].any(), "a pad seat got a gradient"
            if expert_id is not None:
                grads[name, expert_id] = None if parameter.grad is None else parameter.grad[seat]
    counts_E = layer.statistics.counts_E
    return {"y": y.detach(), "x": x.grad, "probs": probs.grad, "grads": grads, "counts": counts_E}


def compare(case: Case, results: list[dict], tolerance: float) -> None:
    data = problem(case)
    x, probs = data["x"].clone().requires_grad_(), data["probs"].clone().requires_grad_()
    weights = {name: weight.clone().requires_grad_() for name, weight in data["weights"].items()}
    ids = data["ids"]
    if data["mask"] is not None:
        ids = ids.masked_fill(~data["mask"][:, None], -1)
    y = plain_experts(x, ids, probs, weights)
    y.backward(data["grad"])
    assert relative_error(torch.cat([r["y"] for r in results]), y.detach()) < tolerance
    if case.hidden_needs_grad:
        assert relative_error(torch.cat([r["x"] for r in results]), x.grad) < tolerance
        assert relative_error(torch.cat([r["probs"] for r in results]), probs.grad) < tolerance
    train = set(range(case.experts)) if case.trainable is None else set(case.trainable)
    for name, weight in weights.items():
        for expert in range(case.experts):
            parts = [r["grads"][name, expert] for r in results if (name, expert) in r["grads"]]
            assert parts, f"no rank holds expert {expert}"
            if expert not in train:
                assert all(part is None for part in parts), f"frozen expert {expert} has a gradient"
            else:
                assert relative_error(sum(parts), weight.grad[expert]) < tolerance, (name, expert)
    counts_E = torch.bincount(ids[ids >= 0].flatten(), minlength=case.experts)
    assert torch.equal(sum(r["counts"] for r in results), counts_E)


CASES = {
    "plain": Case(),
    "even": Case(experts=8),
    "bias": Case(bias=True),
    "recompute": Case(recompute=True),
    "some train": Case(trainable=(1, 5, 6)),
    "some train, recomputed": Case(trainable=(1, 5), recompute=True, bias=True),
    "one rank all frozen": Case(trainable=(0,)),
    "nothing trains": Case(trainable=()),
    "lowest layer": Case(trainable=(2, 3), hidden_needs_grad=False),
    "lowest layer, one rank frozen": Case(trainable=(0,), hidden_needs_grad=False),
    "experts without tokens": Case(only_experts=(4, 5, 6)),
    "fewer tokens than ranks": Case(tokens=(0, 1, 0, 0)),
    "no token at all": Case(tokens=(0, 0, 0, 0)),
    "any placement": Case(reverse_placement=True, trainable=(0, 3)),
    "padding": Case(masked=True),
    "copies": Case(spare=1, trainable=(1, 5), masked=True),
    "copies of most, none trains below": Case(spare=2, trainable=(0,), hidden_needs_grad=False, bias=True),
}


@pytest.mark.parametrize(("world", "expert"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("name", CASES)
def test_float64(ranks, name, world, expert):
    results = ranks(world, layer_on_a_rank, CASES[name], expert, timeout=20)
    compare(CASES[name], results, 1e-12)


# (dispatcher, ranks a node, chunks, sums in fp32)
WAYS = {
    "alltoall": {"way": "alltoall"},
    "alltoall in chunks": {"way": "alltoall", "chunks": 3},
    "dedup in chunks": {"way": "dedup", "chunks": 3},
    "nodes of two": {"way": "node", "node_size": 2},
    "nodes of two in chunks": {"way": "node", "node_size": 2, "chunks": 2},
    "nodes of one": {"way": "node", "node_size": 1},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_every_way_in_float64(ranks, name, way):
    case = replace(CASES[name], **WAYS[way])
    compare(case, ranks(4, layer_on_a_rank, case, 4, timeout=20), 1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wide_sums", [False, True])
def test_every_way_in_float32(ranks, way, wide_sums):
    case = Case(dtype=torch.float32, wide_sums=wide_sums, trainable=(1, 5, 6), **WAYS[way])
    compare(case, ranks(4, layer_on_a_rank, case, 4, timeout=20), 2e-6)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", ["plain", "bias", "some train"])
def test_float32(ranks, name, world):
    case = replace(CASES[name], dtype=torch.float32)
    compare(case, ranks(world, layer_on_a_rank, case, world, timeout=20), 2e-6)


def test_capacity_drops_the_latest_slots_and_counts_them():
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [-1, -1]])
    kept, dropped = drop_over_capacity(ids, 3, 1.0)  # capacity ceil(6/3) = 2
    assert kept.tolist() == [[0, 1], [0, 2], [-1, 1], [-1, -1]]
    assert dropped == 1
    kept, dropped = drop_over_capacity(ids, 3, 1.5)
    assert kept.tolist() == ids.tolist()
    assert dropped == 0


def test_a_dropped_slot_contributes_nothing():
    layer = MoEExperts(ExpertSpec(2, HIDDEN, WIDTH), contiguous(2, ranks=1), Grid.single())
    for _, parameter, _ in layer.expert_parameters():
        torch.nn.init.normal_(parameter)
    x, ids, probs = torch.randn(4, HIDDEN), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1)
    full = layer(x, ids, probs)
    layer.capacity_factor = 1.0
    cut = layer(x, ids, probs)
    assert torch.equal(cut[:2], full[:2])
    assert not cut[2:].any()
    assert layer.statistics.total(None).tolist() == [6, 0, 2]


def saved_bytes(layer, x, ids, probs) -> int:
    seen = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x, ids, probs)
    y.sum().backward()
    return sum(seen.values())


def test_recompute_and_frozen_experts_keep_less():
    def measure(trainable, recompute):
        torch.manual_seed(0)
        layer = MoEExperts(ExpertSpec(4, 16, 64), contiguous(4, ranks=1, trainable=trainable), Grid.single())
        layer.recompute = recompute
        x = torch.randn(64, 16, requires_grad=True)
        return saved_bytes(layer, x, torch.randint(0, 4, (64, 2)), torch.rand(64, 2))

    assert measure(range(4), True) < 0.5 * measure(range(4), False)
    assert measure([], False) < measure(range(4), False)


def test_masters_in_fp32_beside_frozen_bf16_experts():
    """They compute as their rounded values do, and get those values' gradient in fp32; autocast changes nothing."""
    torch.manual_seed(0)
    spec, place = ExpertSpec(5, HIDDEN, WIDTH), contiguous(5, ranks=1, trainable=[1, 3])
    wide, narrow = (MoEExperts(spec, place, Grid.single(), dtype=torch.bfloat16) for _ in range(2))
    for (_, ours, _), (_, theirs, _) in zip(wide.expert_parameters(), narrow.expert_parameters(), strict=True):
        value = torch.randn(ours.shape)
        ours.data, theirs.data = (value if ours.requires_grad else value.bfloat16()), value.bfloat16()
    ids_TK = torch.stack([torch.randperm(5)[:TOP_K] for _ in range(12)])
    x_TH, probs_TK = torch.randn(12, HIDDEN).bfloat16(), torch.rand(12, TOP_K)
    out = {}
    for layer in (wide, narrow):
        y_TH = layer(x_TH, ids_TK, probs_TK)
        y_TH.float().square().sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = layer(x_TH.float(), ids_TK, probs_TK)
        assert again.dtype == torch.float32
        assert torch.equal(again.bfloat16(), y_TH)
        out[layer] = y_TH
    assert torch.equal(out[wide], out[narrow])
    for name, parameter in wide.trainable.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, narrow.trainable.get_parameter(name).grad.float())
