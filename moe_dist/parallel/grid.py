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

from moe_dist.errors import UserError


@dataclass(frozen=True)
class Grid:
    """Sizes of the axes, this rank's place on them, and the process groups (None where a group is this rank alone).

    `expert_group`: the ranks that exchange tokens; together they hold every expert once.
    `expert_data_group`: the ranks that hold the same experts for different tokens.
    `data_group`: the ranks that see different tokens and hold the same dense weights.
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
    expert_rank: int = 0
    expert_data_rank: int = 0
    data_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    node_size: int = 1
    expert_group: dist.ProcessGroup | None = None
    across_group: dist.ProcessGroup | None = None
    inside_group: dist.ProcessGroup | None = None
    expert_data_group: dist.ProcessGroup | None = None
    data_group: dist.ProcessGroup | None = None

    @property
    def expert_data(self) -> int:
        """How many ranks hold the same experts."""
        return self.world // self.pipeline // self.expert

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Grid:
        """The grid of one process, with or without torch.distributed."""
        return Grid(device=torch.device(device))


def check_sizes(world: int, *, expert: int = 1, pipeline: int = 1, sequence: int = 1, tensor: int = 1) -> None:
    """Raise `UserError` for a layout that `world` ranks cannot form, saying what would work."""
    for name, size in (("pipeline", pipeline), ("sequence", sequence), ("tensor", tensor)):
        if size != 1:
            raise UserError(f"parallel.{name}={size}: sizes above 1 of this axis are not available; set it to 1")
    if expert < 1 or world % expert:
        works = [size for size in range(1, world + 1) if world % size == 0]
        raise UserError(
            f"parallel.expert={expert} does not fit {world} rank(s): the expert-parallel size must divide the number "
            f"of ranks. What works here: {', '.join(map(str, works))}; or start more ranks"
        )


def layout(
    world: int, rank: int = 0, *, expert: int = 1, pipeline: int = 1, sequence: int = 1, tensor: int = 1
) -> Grid:
    """The grid as numbers alone, without process groups: what `--dry-run` and the planner look at."""
    check_sizes(world, expert=expert, pipeline=pipeline, sequence=sequence, tensor=tensor)
    sizes = {"pipeline": pipeline, "sequence": sequence, "tensor": tensor, "expert": expert}
    lists = _group_lists(world, **sizes)
    return Grid(
        world=world,
        rank=rank,
        data=world // (pipeline * sequence * tensor),
        expert_rank=_place(rank, lists["expert_group"]),
        expert_data_rank=_place(rank, lists["expert_data_group"]),
        data_rank=_place(rank, lists["data_group"]),
        **sizes,
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
    return {
        "data_group": ranks.permute(0, 2, 3, 1).flatten(0, 2).tolist(),
        "expert_group": folded.flatten(0, 1).tolist(),
        "expert_data_group": folded.transpose(1, 2).flatten(0, 1).tolist(),
    }


def _node_lists(world: int, expert: int, node_size: int) -> dict[str, list[list[int]]]:
    """The member ranks of the groups across and inside nodes; none where an expert group is not several whole nodes."""
    if expert <= node_size or expert % node_size:
        return {}
    ranks = torch.arange(world).view(-1, expert // node_size, node_size)  # [pipeline and expert_data, node, place]
    return {
        "across_group": ranks.transpose(1, 2).flatten(0, 1).tolist(),
        "inside_group": ranks.flatten(0, 1).tolist(),
    }


def _place(rank: int, lists: list[list[int]]) -> int:
    return next(members.index(rank) for members in lists if rank in members)


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
