"""Where the experts of a stacked tensor lie on disk, and how they get from there into memory and back.

A transformers model holds a layer's experts as one tensor `[E, ...]`. On disk they may have a key each, cut into gate
and up, or one stacked key, transposed or interleaved. `ExpertTensorLayout` says it explicitly, one expert at a time,
so that a rank reads and writes the experts that it owns and no others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Concat:
    """Several parts become one, side by side along `dim`; undone by cutting into equal parts."""

    dim: int

    def join(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(parts, dim=self.dim)]

    def split(self, parts: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        (whole,) = parts
        return list(whole.chunk(count, dim=self.dim))


@dataclass(frozen=True)
class Transpose:
    """Every part with two dimensions exchanged."""

    dim0: int
    dim1: int

    def join(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part.transpose(self.dim0, self.dim1) for part in parts]

    def split(self, parts: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        return self.join(parts)


@dataclass(frozen=True)
class Interleave:
    """Pairs a0 b0 a1 b1 ... along `dim` on disk, a0 a1 ... b0 b1 ... in memory; `inverse` the other way round."""

    dim: int
    inverse: bool = False

    def join(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [_regroup(part, self.dim, self.inverse) for part in parts]

    def split(self, parts: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        return [_regroup(part, self.dim, not self.inverse) for part in parts]


Step = Concat | Transpose | Interleave


def _regroup(tensor: torch.Tensor, dim: int, halves_first: bool) -> torch.Tensor:
    half = tensor.shape[dim] // 2
    shape = (2, half) if halves_first else (half, 2)
    return tensor.unflatten(dim, shape).transpose(dim, dim + 1).flatten(dim, dim + 1)


@dataclass(frozen=True)
class ExpertTensorLayout:
    """One stacked expert tensor of a transformers model as it lies on disk.

    target: its name in the transformers model, such as "model.layers.0.mlp.experts.gate_up_proj".
    keys: of each expert, the keys of its parts on disk, in the order in which the parts are joined. With `stacked`
        all experts share the same keys, and expert e is row e of each.
    steps: from one expert's parts on disk to its tensor in memory; dimensions count without the expert dimension.
    """

    target: str
    keys: tuple[tuple[str, ...], ...]
    stacked: bool
    steps: tuple[Step, ...] = ()

    @property
    def num_experts(self) -> int:
        return len(self.keys)

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """One expert's parts from disk -> its tensor as transformers has it in memory, bits unchanged."""
        for step in self.steps:
            parts = step.join(parts)
        (whole,) = parts
        return whole

    def split(self, expert_tensor: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of `join`: views where possible, else copies."""
        parts = [expert_tensor]
        for step in reversed(self.steps):
            parts = step.split(parts, len(self.keys[0]))
        return parts

    def disk_shapes(self, expert_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Every key of this layout and the shape that its tensor must have on disk."""
        parts = self.split(torch.empty(expert_shape, device="meta"))
        shapes = {}
        for keys in self.keys:
            for key, part in zip(keys, parts, strict=True):
                shapes[key] = (self.num_experts, *part.shape) if self.stacked else tuple(part.shape)
        return shapes
