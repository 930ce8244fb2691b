"""Which ranks DeepSpeed reduces and partitions a parameter over: the replicas of its family.

DeepSpeed knows two kinds of parameters: those replicated on all its data-parallel ranks, and experts, whose replicas
are the ranks of an "expert-data group" with a name. Both kinds are given the grid's own groups here. The data-parallel
ranks are those of the pipeline stage; what is cut over the tensor axis passes for another kind of experts, because all
that matters is that its replicas are fewer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import Grid
from moe_dist.train.family import DENSE, EXPERT, TENSOR, family_of, replicas_of

MARKER = "_expert_parallel_marker"
_alone: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []


@dataclass(frozen=True)
class _Stage:
    """What DeepSpeed asks of a model-parallel unit, to stay within a pipeline stage. All else is hidden from it."""

    group: dist.ProcessGroup

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)

    def get_model_parallel_world_size(self) -> int:
        return 1


def place_parameters(model: nn.Module, grid: Grid) -> None:
    """Tell DeepSpeed of the stage's ranks, and of each parameter, frozen ones too, who its replicas are: over them it
    broadcasts at the start, reduces, and partitions at stage 3. Collective."""
    from deepspeed.utils import groups

    stage = None if grid.pipeline == 1 else _or_alone(grid.stage_group, grid)
    # Not handed to `deepspeed.initialize`: optimizers that know of one reduce norms and flags over it, which is ours.
    groups.mpu = None if stage is None else _Stage(stage)
    for family in (EXPERT, TENSOR):
        name = group_name(family, grid)
        if name is not None:
            others = grid.expert_group if family == EXPERT else grid.tensor_group
            groups._EXPERT_PARALLEL_GROUP[name] = others
            groups._EXPERT_DATA_PARALLEL_GROUP[name] = _or_alone(replicas_of(family, grid).group, grid)
    for parameter in model.parameters():
        name = group_name(family_of(parameter), grid)
        if name is not None:
            parameter.allreduce = False
            parameter.group_name = name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = name
            parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(name)
        elif stage is not None:
            parameter.ds_zero_partition_process_group = stage


def group_name(family: str, grid: Grid) -> str | None:
    """DeepSpeed's name for the replicas of a family, None where they are all ranks of the stage.

    It reads the number of different parts from the name. Experts and what is cut over the tensor axis share a name
    where they are cut into as many parts: their replicas are then the same ranks.
    """
    parts = replicas_of(family, grid).parts
    return None if family == DENSE or parts == 1 else f"ep_size_{parts}"


def named_for_deepspeed(group: dict, grid: Grid) -> dict:
    """DeepSpeed takes an optimizer group with `moe` for one whose replicas are the ranks of the group `name`."""
    name = group_name(group["family"], grid)
    return {**group, "moe": name is not None, "name": name or DENSE}


@contextlib.contextmanager
def groups_announced(model: nn.Module, groups: list[dict]) -> Iterator[None]:
    """While DeepSpeed builds its engine, let it find one of its own MoE layers in the model.

    It reads off the presence of such a layer, and nothing else, that optimizer groups may have expert-data groups.
    Where no such parameter trains there is no such optimizer group, and it refuses to be told otherwise.
    """
    if not any(group["moe"] for group in groups):
        yield
        return
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class Marker(AutoEPMoELayer):
        def __init__(self):
            nn.Module.__init__(self)
            self.num_experts = 0

        def set_deepspeed_parallelism(self, *args, **kwargs):
            """The groups exist already."""

    model.add_module(MARKER, Marker())
    try:
        yield
    finally:
        delattr(model, MARKER)


@contextlib.contextmanager
def within_stage(grid: Grid) -> Iterator[None]:
    """While DeepSpeed builds its engine, let the barriers of ZeRO 3 wait for the ranks of the pipeline stage alone:
    other stages may have nothing to build."""
    if grid.pipeline == 1:
        yield
        return
    from deepspeed import comm

    barrier, group = comm.barrier, _or_alone(grid.stage_group, grid)
    comm.barrier = lambda *args, **kwargs: barrier(group=group)
    try:
        yield
    finally:
        comm.barrier = barrier


def compare_within_stage() -> None:
    """Make ZeRO 3's check that all ranks walk through the same modules one of the ranks of a pipeline stage. For good:
    it asks for the stage each time."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.utils import groups

    everywhere = coordinator.assert_ints_same_as_other_ranks
    if getattr(everywhere, "of_the_stage", False):
        return

    def same(numbers: list[int]) -> None:
        if groups.mpu is None:
            return everywhere(numbers)
        stage = groups.mpu.get_data_parallel_group()
        told: list[list[int]] = [[]] * dist.get_world_size(stage)
        dist.all_gather_object(told, numbers, group=stage)
        if any(other != numbers for other in told):
            raise RuntimeError(f"ranks of a pipeline stage walk through different modules: {told}")

    same.of_the_stage = True
    coordinator.assert_ints_same_as_other_ranks = same


def register_expert_parameters(model: nn.Module) -> None:
    """Stage 3 gathers a module's parameters before its forward; an experts layer reads those of its spans, whose own
    forward is never called."""
    from deepspeed import zero

    for module in model.modules():
        if isinstance(module, MoEExperts):
            for _, parameter, _ in module.expert_parameters():
                zero.register_external_parameter(module, parameter)


def _or_alone(group: dist.ProcessGroup | None, grid: Grid) -> dist.ProcessGroup:
    """The group; one of this rank alone in the place of None, which means the whole world to DeepSpeed."""
    if group is not None:
        return group
    world = dist.group.WORLD
    if not _alone or _alone[0][0] is not world:
        _alone[:] = [(world, dist.new_group([grid.rank], use_local_synchronization=True))]
    return _alone[0][1]
