"""Groups of the grid, and layouts that cannot work."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from moe_dist.errors import UserError
from moe_dist.parallel.grid import Grid, build_grid, check_sizes


def groups_on_a_rank(expert: int) -> dict:
    grid = build_grid(expert=expert)
    members = {}
    for name in ("expert_group", "expert_data_group", "data_group"):
        group = getattr(grid, name)
        members[name] = None if group is None else dist.get_process_group_ranks(group)
    return members | {"expert_rank": grid.expert_rank, "expert_data_rank": grid.expert_data_rank}


def test_folded_groups(ranks):
    seen = ranks(4, groups_on_a_rank, 2)
    assert [r["expert_group"] for r in seen] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["expert_data_group"] for r in seen] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["data_group"] for r in seen] == [[0, 1, 2, 3]] * 4
    assert [r["expert_rank"] for r in seen] == [0, 1, 0, 1]
    assert [r["expert_data_rank"] for r in seen] == [0, 0, 1, 1]


@pytest.mark.parametrize("expert", [1, 4])
def test_a_group_of_one_rank_is_none(ranks, expert):
    seen = ranks(4, groups_on_a_rank, expert)
    assert all((r["expert_group"] is None) == (expert == 1) for r in seen)
    assert all((r["expert_data_group"] is None) == (expert == 4) for r in seen)


def test_one_process_needs_no_group():
    assert build_grid() == Grid.single()


def test_layouts_that_cannot_work():
    with pytest.raises(UserError, match=r"expert=3 does not fit 4.*1, 2, 4"):
        check_sizes(4, expert=3)
    with pytest.raises(UserError, match=r"parallel\.tensor=2"):
        check_sizes(4, tensor=2)
