"""Holes, overlaps and strangers among the fragments of all ranks."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from moe_dist.checkpoint import Range, TensorInfo
from moe_dist.checkpoint.coverage import catalogue_differences, coverage_problems
from moe_dist.checkpoint.index import Stored

TABLE = {
    "experts.up": TensorInfo((5, 4), (1, 6), ("weights", "exp_avg")),
    "norm": TensorInfo((7,), None, ("weights",)),
    "none": TensorInfo((0,), None, ("weights",)),
}


def tiling(seed: int) -> list[Stored]:
    """Every tensor cut at random places into files of three ranks."""
    chance, pieces = random.Random(seed), []
    for name, info in TABLE.items():
        for kind in info.kinds:
            for expert in info.expert_ids:
                cuts = sorted({0, info.numel, *(chance.randrange(info.numel + 1) for _ in range(3))})
                pieces += [
                    Stored(f"rank-{chance.randrange(3)}", kind, Range(name, expert, low, high - low), "F32")
                    for low, high in itertools.pairwise(cuts)
                ]
    chance.shuffle(pieces)
    return pieces


@pytest.mark.parametrize("seed", range(20))
def test_every_single_fault_in_a_random_tiling_is_found_and_nothing_else(seed):
    pieces = tiling(seed)
    assert coverage_problems(TABLE, pieces) == []
    for number, piece in enumerate(pieces):
        rest = pieces[:number] + pieces[number + 1 :]
        at = piece.range
        (lost,) = coverage_problems(TABLE, rest)
        assert lost == f"{piece.kind} of {at}: in no file"
        (doubled,) = coverage_problems(TABLE, [*pieces, replace(piece, file="another")])
        assert f"{piece.kind} of {at}: twice" in doubled
        assert coverage_problems(TABLE, [*rest, replace(piece, range=replace(at, length=at.length + 1))])
        assert coverage_problems(TABLE, [*rest, replace(piece, range=replace(at, offset=at.offset + 1))])
        for change in ({"kind": "exp_avg_sq"}, {"range": replace(at, expert=3)}, {"range": replace(at, name="x")}):
            found = coverage_problems(TABLE, [*pieces, replace(piece, **change)])
            assert len(found) == 1
            assert "not among the checkpoint's tensors" in found[0]


def test_a_fragment_within_another_does_not_hide_the_hole_after_it():
    table = {"w": TensorInfo((10,), None, ("weights",))}
    pieces = [Stored("a", "weights", Range("w", -1, low, n), "F32") for low, n in [(0, 6), (2, 1), (8, 2)]]
    assert coverage_problems(table, pieces) == [
        "weights of w [2, 3): twice, in a and in a",
        "weights of w [6, 8): in no file",
    ]


def test_experts_by_their_global_ids():
    pieces = [piece for piece in tiling(0) if piece.range.expert != 6]
    assert sorted(coverage_problems(TABLE, pieces)) == [
        "exp_avg of experts.up expert 6 [0, 20): in no file",
        "weights of experts.up expert 6 [0, 20): in no file",
    ]


def test_a_checkpoint_of_the_same_tensors_matches_whatever_their_order():
    same = {name: TABLE[name] for name in reversed(TABLE)}
    same["experts.up"] = TensorInfo((5, 4), (6, 1), ("weights",))
    assert catalogue_differences(TABLE, same) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"gate": TensorInfo((2,))}, "gate: not in the checkpoint"),
        ({"norm": None}, "norm: in the checkpoint, not in this run"),
        ({"norm": TensorInfo((8,), None, ("weights",))}, "norm: shape (7,) in the checkpoint, (8,) in this run"),
        ({"norm": TensorInfo((7,), (0,), ("weights",))}, "norm: experts' in one, not in the other"),
        ({"norm": TensorInfo((7,))}, "norm: no exp_avg, exp_avg_sq in the checkpoint"),
        ({"experts.up": TensorInfo((5, 4), (1, 6, 9), ("weights",))}, "experts.up: experts [9] not in the checkpoint"),
        (
            {"experts.up": TensorInfo((5, 4), (1,), ("weights",))},
            "experts.up: experts [6] in the checkpoint, not in this run",
        ),
    ],
)
def test_every_difference_is_named(change, line):
    wanted = {name: info for name, info in {**TABLE, **change}.items() if info is not None}
    assert catalogue_differences(TABLE, wanted) == [line]
