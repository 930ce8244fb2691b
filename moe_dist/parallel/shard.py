"""Which part of a whole tensor a rank holds, where the tensor axis cuts it.

A cut parameter carries its `Shard` as the attribute `shard`; all others have none. Its name stays that of the whole
tensor, so that loading, checkpoints and exports need nothing but this to find its place in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Shard:
    """The `part`-th of `parts` equal parts along dimension `dim` (from 0)."""

    dim: int
    part: int
    parts: int

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of `whole`, as a view."""
        assert whole.shape[self.dim] % self.parts == 0, f"{list(whole.shape)} is not cut evenly by {self}"
        length = whole.shape[self.dim] // self.parts
        return whole.narrow(self.dim, self.part * length, length)

    def whole_shape(self, local_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(size * self.parts if dim == self.dim else size for dim, size in enumerate(local_shape))


def shard_of(tensor: torch.Tensor) -> Shard | None:
    """How a parameter is cut; None for one that this rank holds whole."""
    return getattr(tensor, "shard", None)


def cut_parameter(whole: nn.Parameter, shard: Shard) -> nn.Parameter:
    """A parameter of its own memory that holds this part of `whole` and carries the shard."""
    part = nn.Parameter(shard.cut(whole.detach()).clone(), requires_grad=whole.requires_grad)
    part.shard = shard
    return part
