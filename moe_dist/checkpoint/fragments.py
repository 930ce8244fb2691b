"""Arithmetic of fragments: a piece of a rank's flat parameter <-> pieces of global tensors. Pure functions.

A rank holds a stacked expert parameter `[S, ...]`, S seats, each the home of one global expert (or of none: a pad
seat). ZeRO cuts the flattened parameter anywhere. A checkpoint knows neither seats nor cuts: it knows elements
`[offset, offset + length)` of the flattened tensor of one global expert. A parameter that is no expert's is a stack
of one seat whose id is `NOT_EXPERT`.

Of a tensor that is cut over the tensor axis a rank holds a part, whose elements lie in the whole one as runs of equal
length at equal distances: one run where it is cut along its first dimension, one a row where along its second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_dist.checkpoint.blocks import split_rows

NOT_EXPERT = -1


@dataclass(frozen=True)
class Range:
    """Elements `[offset, offset + length)` of the flat tensor `name` (of its expert `expert`).

    With `runs` > 1 they are repeated: run k is `[offset + k·stride, offset + k·stride + length)`.
    """

    name: str
    expert: int
    offset: int
    length: int
    runs: int = 1
    stride: int = 0

    @property
    def numel(self) -> int:
        return self.runs * self.length

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.offset + (self.runs - 1) * self.stride + self.length

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The range as a view `[runs, length]` of the whole tensor's flat elements."""
        return flat.as_strided((self.runs, self.length), (self.stride, 1), flat.storage_offset() + self.offset)

    def __str__(self) -> str:
        first = f"{label(self.name, self.expert)} [{self.offset}, {self.offset + self.length})"
        return first if self.runs == 1 else f"{first} and {self.runs - 1} more, each {self.stride} on"


@dataclass(frozen=True)
class Fragment:
    """`tensor`, 1-D: the elements of a `Range` of `numel` elements, one after the other."""

    name: str
    expert: int
    offset: int
    tensor: torch.Tensor
    runs: int = 1
    stride: int = 0

    @property
    def range(self) -> Range:
        return Range(self.name, self.expert, self.offset, self.tensor.numel() // self.runs, self.runs, self.stride)


@dataclass(frozen=True)
class Place:
    """A range of a global tensor and where it lies in a local flat buffer: `[start, start + range.numel)`."""

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


def wanted_for_part(name: str, *, run: int, first: int, stride: int, flat_offset: int, length: int) -> list[Place]:
    """The global ranges, three at most, behind elements `[flat_offset, flat_offset + length)` of a local part.

    The part consists of runs of `run` elements; its k-th run begins at element `first + k·stride` of the whole tensor.
    """
    places = []
    for block in split_rows(flat_offset, length, run):
        offset = first + block.row * stride + block.column
        repeated = (block.rows, stride) if block.rows > 1 else (1, 0)
        places.append(Place(Range(name, NOT_EXPERT, offset, block.columns, *repeated), block.start))
    return places


def cut_at(places: Sequence[Place], tensor: torch.Tensor) -> list[Fragment]:
    """The fragments, views of `tensor` (1-D), that lie at `places` in it."""
    assert tensor.dim() == 1, tuple(tensor.shape)
    fragments = []
    for place in places:
        at = place.range
        elements = tensor[place.start : place.start + at.numel]
        fragments.append(Fragment(at.name, at.expert, at.offset, elements, at.runs, at.stride))
    return fragments
