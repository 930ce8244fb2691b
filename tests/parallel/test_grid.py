"""Groups of the grid, and layouts that cannot work."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from moe_dist.errors import UserError
from moe_dist.parallel.grid import Grid, _group_lists, build_grid, layout
from moe_dist.parallel.sizes import check_sizes


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
    with pytest.raises(
        UserError, match=r"parallel\.sequence=2 x parallel\.tensor=3.*6 must divide.*Start 12 ranks or 6"
    ):
        check_sizes(8, sequence=2, tensor=3)
    with pytest.raises(UserError, match=r"expert=4 does not fit the 2 rank\(s\) of a pipeline stage.*1, 2"):
        check_sizes(4, pipeline=2, expert=4)
    with pytest.raises(UserError, match=r"parallel\.tensor=0"):
        check_sizes(4, tensor=0)
    check_sizes(16, pipeline=2, sequence=2, tensor=2, expert=8)


AXES = {"pipeline": 2, "sequence": 2, "tensor": 2, "expert": 4}


def test_all_axes_as_numbers():
    """16 ranks as [pipeline 2, data 2, sequence 2, tensor 2]: rank 13 = 1·8 + 1·4 + 0·2 + 1."""
    grid = layout(16, 13, **AXES)
    assert (grid.pipeline_rank, grid.data_rank, grid.sequence_rank, grid.tensor_rank) == (1, 1, 0, 1)
    assert (grid.expert_rank, grid.expert_data_rank, grid.expert_data) == (1, 1, 2)
    assert (grid.stage_size, grid.stage_rank, grid.slices, grid.slice_rank) == (8, 5, 4, 1)
    assert (grid.is_first_stage, grid.is_last_stage) == (False, True)


def test_all_axes_as_groups():
    lists = _group_lists(16, **AXES)
    mine = {name: next(members for members in groups if 13 in members) for name, groups in lists.items()}
    assert mine == {
        "stage_group": [8, 9, 10, 11, 12, 13, 14, 15],
        "data_group": [9, 13],
        "sequence_group": [13, 15],
        "tensor_group": [12, 13],
        "slice_group": [12, 13, 14, 15],
        "tensor_data_group": [9, 11, 13, 15],
        "expert_group": [12, 13, 14, 15],
        "expert_data_group": [9, 13],
        "pipeline_group": [5, 13],
        "embedding_group": list(range(16)),
    }
    for groups in lists.values():
        assert sorted(rank for members in groups for rank in members) == list(range(16))


def axes_on_a_rank() -> dict:
    grid = build_grid(pipeline=2, tensor=2, expert=2)
    return {name: dist.get_process_group_ranks(group) for name in AXES if (group := getattr(grid, f"{name}_group"))}


def test_groups_of_pipeline_and_tensor(ranks):
    seen = ranks(4, axes_on_a_rank)
    assert seen[3] == {"pipeline": [1, 3], "tensor": [2, 3], "expert": [2, 3]}
