"""The benchmarks of the layer, on small shapes: dispatch, saved_bytes, precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import dispatch, precision, saved_bytes
from benchmarks._moe_peers import Contender, Problem, Shape
from moe_dist.parallel.grid import Grid


def dispatch_rows(ranks: int) -> list[dict]:
    dispatch.EXPERTS, dispatch.TOP_K, dispatch.HIDDEN, dispatch.WIDTH, dispatch.TOKENS = 8, 2, 16, 8, 16 * ranks
    dispatch.SHARED_WIDTH, dispatch.ROUNDS = 8, (1, 1)
    return list(dispatch.measure(0.0))


@pytest.mark.parametrize("world", [2, 4])
def test_every_way_of_dispatch_on_every_workload(ranks, world):
    """Their results are compared on the way: a difference raises."""
    rows = ranks(world, dispatch_rows, world)[0]
    assert len(rows) == 8 * (len(dispatch.WAYS) - 1) + 2
    assert rows[-1]["case"] == f"W0 balanced and a shared expert, {world} ranks, node, overlap"
    assert all(row["ratio"] > 0 and len(row["ours_spread"]) == 2 for row in rows)


def compared() -> str:
    one = {"output": torch.ones(3, 4)}
    try:
        dispatch.compare(dispatch.PLAIN, "W0", {"output": one["output"] * 1.1}, one)
    except dispatch.Missed as missed:
        return str(missed)
    return ""


def test_another_result_is_noticed(ranks):
    assert "output differs" in ranks(2, compared)[1]


def test_saved_bytes_are_counted_once_and_without_weights():
    problem = Problem(Shape(32, 4, 2, 16, 8), torch.float32, Grid.single())
    weight = nn.Parameter(torch.eye(16))
    modules = nn.ParameterList([weight])
    shared = Contender("one tensor saved twice", lambda x: (a := x.exp()) * a, modules, lambda i: ())
    assert saved_bytes.saved(problem, shared) == 32 * 16 * 4
    product = Contender("a product saves its input", lambda x: x.exp() @ weight, modules, lambda i: ())
    assert saved_bytes.saved(problem, product) == 32 * 16 * 4
    assert saved_bytes.kept(problem, product) == 2 * 32 * 16 * 4  # and its output


def test_saved_bytes_of_a_small_layer():
    rows = list(saved_bytes.measure(Shape(64, 8, 2, 32, 16), "bf16", torch.bfloat16))
    assert [(row["case"].rpartition(" ")[2], row["peer_name"]) for row in rows] == [
        (what, f"transformers {which}") for which in ("grouped_mm", "eager") for what in ("saved", "kept")
    ]
    assert all(row["ratio"] > 1 for row in rows)


def errors_of_two(draws: int) -> list[tuple]:
    precision.EXPERTS, precision.TOP_K, precision.HIDDEN, precision.WIDTH, precision.TOKENS = 8, 2, 32, 16, 32
    return list(precision.errors(draws))


def test_precision_errors_are_those_of_bf16(ranks):
    found = ranks(2, errors_of_two, 2)
    assert found[0] == found[1]
    assert {(way, what) for way, what, _ in found[0]} == {
        (way, what) for way in precision.WAYS for what in ("output", "input gradient")
    }
    assert all(1e-3 < value < 1e-2 for _, _, values in found[0] for value in values)
