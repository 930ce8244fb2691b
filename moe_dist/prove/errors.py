"""Relative errors of tensors whose parts lie on many ranks, without ever gathering a tensor.

Each rank compares its parts with those of the plain process and adds up; what travels is four numbers a tensor: the
squares of differences and of the reference, how many elements were compared, and the sum of their indices, by which an
element that came twice in another's place shows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_dist.checkpoint.fragments import Range
from moe_dist.parallel.grid import Grid


@dataclass
class Tally:
    """What was compared of one tensor: ‖found − expected‖², ‖expected‖², elements, the sum of their indices."""

    difference: float = 0.0
    size: float = 0.0
    count: int = 0
    indices: int = 0

    def add(self, other: Tally) -> None:
        self.difference += other.difference
        self.size += other.size
        self.count += other.count
        self.indices += other.indices

    @property
    def error(self) -> float:
        """‖found − expected‖ / ‖expected‖; infinite where the reference is zero and the other is not, or not finite."""
        if not math.isfinite(self.difference):
            return math.inf
        if self.size == 0:
            return 0.0 if self.difference == 0 else math.inf
        return math.sqrt(self.difference / self.size)

    def covers(self, numel: int) -> bool:
        """Whether each of so many elements has been compared once."""
        return (self.count, self.indices) == (numel, numel * (numel - 1) // 2)


class Tallies:
    """Tallies by name of one kind of tensor."""

    def __init__(self):
        self.found: dict[Hashable, Tally] = {}

    def add(self, key: Hashable, found: torch.Tensor, expected: torch.Tensor, *, indices: int = 0) -> None:
        """Compare a part of a tensor, in float64. indices: the sum of its elements' indices in the flat whole."""
        found, expected = found.detach().cpu().double().flatten(), expected.double().flatten()
        difference, size = (found - expected).square().sum().item(), expected.square().sum().item()
        tally = Tally(difference, size, len(found), indices)
        self.found.setdefault(key, Tally()).add(tally)

    def over_ranks(self, grid: Grid) -> dict[Hashable, Tally]:
        """Tallies of whole tensors. Collective."""
        merged: dict[Hashable, Tally] = {}
        for found in everyone(self.found, grid):
            for key, tally in found.items():
                merged.setdefault(key, Tally()).add(tally)
        return merged


def sum_of_indices(part: Range) -> int:
    """Of the elements of a range, within the flat tensor: exact, however large."""
    first = part.length * part.offset + part.length * (part.length - 1) // 2  # of its first run
    return part.runs * first + part.length * part.stride * (part.runs * (part.runs - 1) // 2)


def everyone(value, grid: Grid) -> list:
    """`value` of every rank, in order. Collective."""
    if grid.world == 1:
        return [value]
    values: list = [None] * grid.world
    dist.all_gather_object(values, value)
    return values


def worst_of_ranks(errors: dict[str, float], grid: Grid) -> dict[str, float]:
    """Of each name the largest error that a rank has found. Collective."""
    every = everyone(errors, grid)
    return {key: max(own.get(key, 0.0) for own in every) for key in sorted(set().union(*every))}
