"""Pieces: which elements of which parameter this rank's optimizer owns, whatever engine lies below.

Over all ranks every element of every trainable parameter belongs to exactly one piece. That one property makes the
global gradient norm a plain sum of squares over ranks, and a checkpoint complete without any gathering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moe_dist.checkpoint.fragments import NOT_EXPERT, Fragment, Place, cut_at, wanted_for, wanted_for_part
from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.shard import shard_of
from moe_dist.train.family import Replicas

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

    def places(self, offset: int, length: int) -> list[Place]:
        return wanted_for(self.name, self.seat_ids, self.per_expert_numel, offset, length)

    def fragments(self, offset: int, tensor: torch.Tensor) -> list[Fragment]:
        return cut_at(self.places(offset, tensor.numel()), tensor)


@dataclass(frozen=True)
class PartName(GlobalName):
    """What a part of a tensor cut over the tensor axis is called: run k of it, of `per_expert_numel` elements, begins
    at element `first + k·stride` of the whole tensor."""

    first: int
    stride: int

    def places(self, offset: int, length: int) -> list[Place]:
        return wanted_for_part(
            self.name,
            run=self.per_expert_numel,
            first=self.first,
            stride=self.stride,
            flat_offset=offset,
            length=length,
        )


def global_names(model: nn.Module, copies: Mapping[str, str] | None = None) -> dict[nn.Parameter, GlobalName]:
    """The global name of every local parameter. Call it before ZeRO 3 empties the parameters.

    An expert tensor is named by its layer's path and the parameter's own name, without the span that holds it: whether
    an expert trains does not change what it is called.
    copies: local name -> name of the tensor, held by another pipeline stage, that it is a copy of.
    """
    names: dict[nn.Parameter, GlobalName] = {}
    for path, module in model.named_modules():
        if isinstance(module, MoEExperts):
            for name, parameter, seat_ids in module.expert_parameters():
                names[parameter] = GlobalName(f"{path}.{name}", seat_ids, parameter[0].numel())
    for local, parameter in model.named_parameters():
        if parameter in names:
            continue
        name, shard = (copies or {}).get(local, local), shard_of(parameter)
        if shard is None:
            names[parameter] = GlobalName(name, (NOT_EXPERT,), parameter.numel())
        else:
            # Along the dimension that is cut the part is one block of rows; before it, one such block for each index.
            run = parameter[(0,) * shard.dim].numel()
            names[parameter] = PartName(name, (NOT_EXPERT,), run, shard.part * run, shard.parts * run)
    return names


def share(numel: int, *, part: int, parts: int) -> tuple[int, int]:
    """(offset, length) of the part-th of `parts` even slices of `numel` elements; the last ones may be empty."""
    size = -(-numel // parts)
    offset = min(part * size, numel)
    return offset, min(size, numel - offset)


def replicated_pieces(
    masters: dict[nn.Parameter, torch.Tensor], replicas: Callable[[nn.Parameter], Replicas] | None = None
) -> Iterator[Piece]:
    """Pieces where each replica holds the whole optimizer state: every replica answers for an even slice.

    Without `replicas` they are what this rank holds: everything.
    """
    for parameter, master in masters.items():
        offset, length = 0, master.numel()
        if replicas is not None:
            among = replicas(parameter)
            offset, length = share(master.numel(), part=among.place, parts=among.count)
        if length:
            yield Piece(parameter, offset, length, master, offset, _slice_of_grad(master, offset, length))


def _slice_of_grad(master: torch.Tensor, offset: int, length: int) -> Callable[[], torch.Tensor | None]:
    def gradient() -> torch.Tensor | None:
        return None if master.grad is None else master.grad.view(-1)[offset : offset + length]

    return gradient
