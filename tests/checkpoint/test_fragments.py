"""Cutting local flat parameters into global fragments, and back."""

from __future__ import annotations

import pytest
import torch

from moe_dist.checkpoint import NOT_EXPERT, Range, wanted_for
from moe_dist.checkpoint.fragments import cut_at
from tests.checkpoint.worlds import KINDS, TRAINED, World, catalogue, truth

EP_SIZES = (1, 2, 4)
SHARDS = (1, 2, 3, 4)


def test_a_cut_in_the_middle_of_two_experts_gives_the_parts_of_both():
    places = wanted_for("w", (5, 2), 4, 3, 3)
    assert [(place.range, place.start) for place in places] == [(Range("w", 5, 3, 1), 0), (Range("w", 2, 0, 2), 1)]


def test_pad_seats_belong_to_nothing_and_leave_a_gap_in_the_buffer():
    places = wanted_for("w", (None, 8, None, 1), 3, 0, 12, at=100)
    assert [(place.range, place.start) for place in places] == [(Range("w", 8, 0, 3), 103), (Range("w", 1, 0, 3), 109)]


def test_a_parameter_that_is_no_experts_is_one_fragment():
    values = torch.arange(7.0)
    (fragment,) = cut_at(wanted_for("norm", (NOT_EXPERT,), 10, 2, 7), values)
    assert (fragment.expert, fragment.offset) == (NOT_EXPERT, 2)
    assert fragment.tensor.data_ptr() == values.data_ptr(), "fragments are views"


def test_nothing_of_an_empty_range():
    assert wanted_for("w", (1, 2), 4, 4, 0) == []
    assert wanted_for("w", (1, 2), 0, 0, 0) == []


def test_a_range_outside_the_parameter_is_a_bug():
    with pytest.raises(AssertionError):
        wanted_for("w", (1, 2), 4, 5, 4)


@pytest.mark.parametrize("expert", EP_SIZES)
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_fragments_of_all_ranks_are_every_element_once_with_its_value(expert, shards, seed):
    world, values = World(expert, shards, seed), truth(seed)
    counts = {key: torch.zeros(value.numel(), dtype=torch.int64) for key, value in values.items()}
    for rank in range(world.size):
        for kind, fragments in world.fragments(rank, values).items():
            for piece in fragments:
                key, stop = (kind, piece.name, piece.expert), piece.offset + piece.tensor.numel()
                counts[key][piece.offset : stop] += 1
                assert torch.equal(piece.tensor, values[key][piece.offset : stop])
    assert {key[2] for key in counts} == {*TRAINED, NOT_EXPERT}
    assert all(bool((count == 1).all()) for count in counts.values())


@pytest.mark.parametrize("expert", EP_SIZES)
@pytest.mark.parametrize("shards", SHARDS)
def test_places_are_the_inverse_of_fragments(expert, shards):
    world, values = World(expert, shards, seed=9), truth()
    for rank in range(world.size):
        wanted = [place.range for place in world.places(rank)]
        for kind in KINDS:
            fragments = world.fragments(rank, values)[kind]
            assert wanted == [Range(f.name, f.expert, f.offset, f.tensor.numel()) for f in fragments]
            flat = torch.zeros_like(world.shard(rank, values, kind))
            for place, fragment in zip(world.places(rank), fragments, strict=True):
                flat[place.start : place.start + place.range.length] = fragment.tensor
            assert torch.equal(flat, world.shard(rank, values, kind))
    assert set(catalogue()) == {place.range.name for rank in range(world.size) for place in world.places(rank)}
