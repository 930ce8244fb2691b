"""Pieces: which elements of which parameter this rank's optimizer owns, whatever engine lies below.

Over all ranks every element of every trainable parameter belongs to exactly one piece. That one property makes the
global gradient norm a plain sum of squares over ranks, and a checkpoint complete without any gathering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from moe_dist.checkpoint.fragments import NOT_EXPERT, Fragment, Place, split_flat, wanted_for
from moe_dist.moe.layer import MoEExperts

KINDS = ("weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements `[offset, offset + length)` of the flattened local `parameter`.

    Their fp32 masters are the elements from `start` on of `flat`, which is the tensor that the optimizer steps and by
    which it keeps its state. `gradient()` gives their reduced gradient as a flat view that may be written, None
    where no backward has reached the parameter.
    """

    parameter: nn.Parameter
    offset: int
    length: int
    flat: torch.Tensor
    start: int
    gradient: Callable[[], torch.Tensor | None]

    def view(self, kind: str, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """The flat fp32 view of one kind: weights (the masters), exp_avg, exp_avg_sq."""
        whole = self.flat.detach() if kind == "weights" else optimizer.state[self.flat][kind]
        return whole.view(-1)[self.start : self.start + self.length]


@dataclass(frozen=True)
class GlobalName:
    """What the seats of a local parameter are called in the world: see `checkpoint.fragments`."""

    name: str
    seat_ids: tuple[int | None, ...]
    per_expert_numel: int

    def fragments(self, offset: int, tensor: torch.Tensor) -> list[Fragment]:
        return split_flat(self.name, self.seat_ids, self.per_expert_numel, offset, tensor)

    def places(self, offset: int, length: int) -> list[Place]:
        return wanted_for(self.name, self.seat_ids, self.per_expert_numel, offset, length)


def global_names(model: nn.Module) -> dict[nn.Parameter, GlobalName]:
    """The global name of every local parameter. Call it before ZeRO 3 empties the parameters.

    An expert tensor is named by its layer's path and the parameter's own name, without the span that holds it: whether
    an expert trains does not change what it is called.
    """
    names = {}
    for path, module in model.named_modules():
        if isinstance(module, MoEExperts):
            for name, parameter, seat_ids in module.expert_parameters():
                names[parameter] = GlobalName(f"{path}.{name}", seat_ids, parameter[0].numel())
    for name, parameter in model.named_parameters():
        if parameter not in names:
            names[parameter] = GlobalName(name, (NOT_EXPERT,), parameter.numel())
    return names


def share(numel: int, *, part: int, parts: int) -> tuple[int, int]:
    """(offset, length) of the part-th of `parts` even slices of `numel` elements; the last ones may be empty."""
    size = -(-numel // parts)
    offset = min(part * size, numel)
    return offset, min(size, numel - offset)


def replicated_pieces(
    masters: dict[nn.Parameter, torch.Tensor], place: Callable[[nn.Parameter], tuple[int, int]]
) -> Iterator[Piece]:
    """Pieces where each replica holds the whole optimizer state: every replica answers for an even slice.

    `place(parameter)` is this rank's (place, count) among the parameter's replicas.
    """
    for parameter, master in masters.items():
        part, parts = place(parameter)
        offset, length = share(master.numel(), part=part, parts=parts)
        if length:
            yield Piece(parameter, offset, length, master, offset, _slice_of_grad(master, offset, length))


def _slice_of_grad(master: torch.Tensor, offset: int, length: int) -> Callable[[], torch.Tensor | None]:
    def gradient() -> torch.Tensor | None:
        return None if master.grad is None else master.grad.view(-1)[offset : offset + length]

    return gradient
