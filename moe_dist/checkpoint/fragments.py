"""Arithmetic of fragments: a piece of a rank's flat parameter <-> pieces of global tensors. Pure functions.

A rank holds a stacked expert parameter `[S, ...]`, S seats, each the home of one global expert (or of none: a pad
seat). ZeRO cuts the flattened parameter anywhere. A checkpoint knows neither seats nor cuts: it knows elements
`[offset, offset + length)` of the flattened tensor of one global expert. A parameter that is no expert's is a stack
of one seat whose id is `NOT_EXPERT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NOT_EXPERT = -1


@dataclass(frozen=True)
class Fragment:
    """`tensor`, 1-D: elements `[offset, offset + numel)` of the flat tensor `name` (of its expert `expert`)."""

    name: str
    expert: int
    offset: int
    tensor: torch.Tensor


@dataclass(frozen=True)
class Range:
    """Elements `[offset, offset + length)` of the flat tensor `name` (of its expert `expert`)."""

    name: str
    expert: int
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{label(self.name, self.expert)} [{self.offset}, {self.offset + self.length})"


@dataclass(frozen=True)
class Place:
    """A range of a global tensor and where it lies in a local flat buffer: `[start, start + range.length)`."""

    range: Range
    start: int


def label(name: str, expert: int) -> str:
    """How messages call a tensor."""
    return name if expert == NOT_EXPERT else f"{name} expert {expert}"


def wanted_for(
    name: str,
    seat_ids: Sequence[int | None],
    per_expert_numel: int,
    flat_offset: int,
    length: int,
    *,
    at: int = 0,
) -> list[Place]:
    """The global ranges behind elements `[flat_offset, flat_offset + length)` of a local stacked parameter.

    `seat_ids` gives the global expert of each seat, None for a pad seat, whose elements belong to nothing and are left
    out. `at` is where the first of those elements lies in the local buffer that the places point into.
    """
    stop = flat_offset + length
    assert 0 <= flat_offset <= stop <= len(seat_ids) * per_expert_numel, (name, flat_offset, length)
    places = []
    position = flat_offset
    while position < stop:
        seat, offset = divmod(position, per_expert_numel)
        count = min(stop - position, per_expert_numel - offset)
        expert = seat_ids[seat]
        if expert is not None:
            places.append(Place(Range(name, expert, offset, count), at + position - flat_offset))
        position += count
    return places


def split_flat(
    name: str,
    seat_ids: Sequence[int | None],
    per_expert_numel: int,
    flat_offset: int,
    tensor: torch.Tensor,
) -> list[Fragment]:
    """Cut `tensor`, 1-D, the elements of a local stacked parameter from `flat_offset` on, at the experts' boundaries.

    The fragments are views. Pad seats are dropped.
    """
    assert tensor.dim() == 1, tuple(tensor.shape)
    return [
        Fragment(name, place.range.expert, place.range.offset, tensor[place.start : place.start + place.range.length])
        for place in wanted_for(name, seat_ids, per_expert_numel, flat_offset, tensor.numel())
    ]
