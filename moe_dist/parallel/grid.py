"""The grid: which rank belongs to which group.

All ranks form one tensor `[pipeline, data, sequence, tensor]`; every group is a view of it. Expert parallelism is
*folded*: the ranks of one pipeline stage are cut a second time, as `[expert_data, expert]`, whatever the data,
sequence and tensor sizes are. An expert group is a block of consecutive ranks, so that the all-to-all stays inside a
node as long as a node is large enough.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from moe_dist.parallel.sizes import check_sizes


@dataclass(frozen=True)
class Grid:
    """Sizes of the axes, this rank's place on them, and the process groups (None where a group is this rank alone).

    Every rank of a pipeline stage holds other tokens: rows are dealt over the data axis, a row is cut over the sequence
    axis, and each block of it over the tensor axis.

    `stage_group`: all ranks of a pipeline stage; they hold the same whole dense weights for different tokens.
    `data_group`: the ranks of a stage with the same slice of different rows.
    `slice_group`: the ranks that share rows, each with a slice of their tokens: `sequence_group` times `tensor_group`.
    `tensor_data_group`: the ranks of a stage that hold the same part of what is cut over the tensor axis.
    `expert_group`: the ranks that exchange tokens; together they hold every expert once.
    `expert_data_group`: the ranks that hold the same experts for different tokens.
    `pipeline_group`: the ranks of all stages that see the same tokens, in order of depth.
    `embedding_group`: the ranks of the first and the last stage, where there are two.
    `node_size`: consecutive ranks that share a node. Where an expert group consists of several whole nodes it is cut
    twice more: `across_group` is the ranks with this rank's place in their nodes, `inside_group` those of its node.
    """

    world: int = 1
    rank: int = 0
    pipeline: int = 1
    data: int = 1
    sequence: int = 1
    tensor: int = 1
    expert: int = 1
    pipeline_rank: int = 0
    data_rank: int = 0
    sequence_rank: int = 0
    tensor_rank: int = 0
    expert_rank: int = 0
    expert_data_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    node_size: int = 1
    stage_group: dist.ProcessGroup | None = None
    data_group: dist.ProcessGroup | None = None
    sequence_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None
    slice_group: dist.ProcessGroup | None = None
    tensor_data_group: dist.ProcessGroup | None = None
    expert_group: dist.ProcessGroup | None = None
    expert_data_group: dist.ProcessGroup | None = None
    across_group: dist.ProcessGroup | None = None
    inside_group: dist.ProcessGroup | None = None
    pipeline_group: dist.ProcessGroup | None = None
    embedding_group: dist.ProcessGroup | None = None

    @property
    def stage_size(self) -> int:
        """How many ranks one pipeline stage has."""
        return self.world // self.pipeline

    @property
    def stage_rank(self) -> int:
        """This rank's place in its stage."""
        return self.rank % self.stage_size

    @property
    def slices(self) -> int:
        """Into how many slices a row is cut."""
        return self.sequence * self.tensor

    @property
    def slice_rank(self) -> int:
        """Which slice of its rows this rank holds, in order of the tokens."""
        return self.sequence_rank * self.tensor + self.tensor_rank

    @property
    def expert_data(self) -> int:
        """How many ranks hold the same experts."""
        return self.stage_size // self.expert

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Grid:
        """The grid of one process, with or without torch.distributed."""
        return Grid(device=torch.device(device))


def layout(
    world: int, rank: int = 0, *, expert: int = 1, pipeline: int = 1, sequence: int = 1, tensor: int = 1
) -> Grid:
    """The grid as numbers alone, without process groups: what `--dry-run` and the planner look at."""
    check_sizes(world, expert=expert, pipeline=pipeline, sequence=sequence, tensor=tensor)
    data = world // (pipeline * sequence * tensor)
    outer, tensor_rank = divmod(rank, tensor)
    outer, sequence_rank = divmod(outer, sequence)
    pipeline_rank, data_rank = divmod(outer, data)
    expert_data_rank, expert_rank = divmod(rank % (world // pipeline), expert)
    return Grid(
        world=world,
        rank=rank,
        pipeline=pipeline,
        data=data,
        sequence=sequence,
        tensor=tensor,
        expert=expert,
        pipeline_rank=pipeline_rank,
        data_rank=data_rank,
        sequence_rank=sequence_rank,
        tensor_rank=tensor_rank,
        expert_rank=expert_rank,
        expert_data_rank=expert_data_rank,
    )


def build_grid(
    *,
    expert: int = 1,
    pipeline: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    node_size: int | None = None,
    device: torch.device | str = "cpu",
) -> Grid:
    """Cut the running torch.distributed world (one process if there is none) into groups. Collective.

    node_size: ranks that share a node; what the launcher says (LOCAL_WORLD_SIZE) when absent, else all.
    Every group is used once before this returns: a communicator that is set up lazily in the middle of a step can
    hang or run out of memory far from its cause.
    """
    initialised = dist.is_available() and dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if initialised else (1, 0)
    sizes = {"pipeline": pipeline, "sequence": sequence, "tensor": tensor, "expert": expert}
    grid = layout(world, rank, **sizes)
    node_size = node_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    lists = _group_lists(world, **sizes) | _node_lists(world, expert, node_size)
    groups = {name: _my_group(rank, members) for name, members in lists.items()}
    device = torch.device(device)
    for group in groups.values():
        if group is not None:
            dist.all_reduce(torch.zeros(1, device=device), group=group)
    return replace(grid, device=device, node_size=node_size, **groups)


def _group_lists(world: int, *, expert: int, pipeline: int, sequence: int, tensor: int) -> dict[str, list[list[int]]]:
    """The member ranks of every group, by axis."""
    ranks = torch.arange(world).view(pipeline, -1, sequence, tensor)
    folded = torch.arange(world).view(pipeline, -1, expert)  # [pipeline, expert_data, expert]
    lists = {
        "stage_group": ranks.flatten(1),
        "data_group": ranks.permute(0, 2, 3, 1).flatten(0, 2),
        "sequence_group": ranks.permute(0, 1, 3, 2).flatten(0, 2),
        "tensor_group": ranks.flatten(0, 2),
        "slice_group": ranks.flatten(2).flatten(0, 1),
        "tensor_data_group": ranks.permute(0, 3, 1, 2).flatten(2).flatten(0, 1),
        "expert_group": folded.flatten(0, 1),
        "expert_data_group": folded.transpose(1, 2).flatten(0, 1),
        "pipeline_group": ranks.permute(1, 2, 3, 0).flatten(0, 2),
    }
    if pipeline > 1:
        lists["embedding_group"] = ranks[[0, -1]].flatten().unsqueeze(0)
    return {name: members.tolist() for name, members in lists.items()}


def _node_lists(world: int, expert: int, node_size: int) -> dict[str, list[list[int]]]:
    """The member ranks of the groups across and inside nodes; none where an expert group is not several whole nodes."""
    if expert <= node_size or expert % node_size:
        return {}
    ranks = torch.arange(world).view(-1, expert // node_size, node_size)  # [pipeline and expert_data, node, place]
    return {
        "across_group": ranks.transpose(1, 2).flatten(0, 1).tolist(),
        "inside_group": ranks.flatten(0, 1).tolist(),
    }


# Groups of the running world by their members: each has threads and connections of its own, so none is made twice.
_made: dict[tuple[int, ...], dist.ProcessGroup] = {}
_made_in: list[dist.ProcessGroup] = []


def _my_group(rank: int, lists: list[list[int]]) -> dist.ProcessGroup | None:
    """Every group of one axis, made where it is not there yet (all ranks take part in that); returns this rank's."""
    if _made_in != [dist.group.WORLD]:
        _made.clear()
        _made_in[:] = [dist.group.WORLD]
    mine = None
    for members in map(tuple, lists):
        if len(members) == 1:
            continue
        if members not in _made:
            _made[members] = dist.new_group(list(members))
        if rank in members:
            mine = _made[members]
    return mine
