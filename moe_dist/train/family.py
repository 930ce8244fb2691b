"""Families of parameters: which ranks hold replicas of one.

Every rank of a pipeline stage sees other tokens, so each replica of a parameter has a part of its gradient, and the
gradient of the step is the plain sum over the replicas. Who they are depends on the family:

    dense    all ranks of the stage
    expert   the ranks of the stage that hold the same experts
    tensor   of a parameter cut over the tensor axis: the ranks of the stage that hold the same part
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.parallel.grid import Grid
from moe_dist.parallel.shard import shard_of

DENSE, EXPERT, TENSOR = FAMILIES = ("dense", "expert", "tensor")


@dataclass(frozen=True)
class Replicas:
    """This rank's place among `count` ranks that hold the same; their group is None where it is this rank alone.

    parts: into how many different parts the stage's ranks hold such a parameter.
    """

    place: int
    count: int
    parts: int
    group: dist.ProcessGroup | None


def is_expert(parameter: torch.Tensor) -> bool:
    """Whether the parameter belongs to experts, which other ranks of an expert group do not hold."""
    return getattr(parameter, "is_expert", False)


def family_of(parameter: torch.Tensor) -> str:
    if is_expert(parameter):
        return EXPERT
    return DENSE if shard_of(parameter) is None else TENSOR


def replicas_of(family: str, grid: Grid) -> Replicas:
    """The replicas, on this rank, of the parameters of a family."""
    if family == EXPERT:
        return Replicas(grid.expert_data_rank, grid.expert_data, grid.expert, grid.expert_data_group)
    if family == TENSOR:
        # The tensor axis is the innermost: every `tensor`-th rank of the stage holds the same part.
        place, count = grid.stage_rank // grid.tensor, grid.stage_size // grid.tensor
        return Replicas(place, count, grid.tensor, grid.tensor_data_group)
    return Replicas(grid.stage_rank, grid.stage_size, 1, grid.stage_group)


def trained_families(model: nn.Module) -> set[str]:
    return {family_of(parameter) for parameter in model.parameters() if parameter.requires_grad}
