"""Saving and resuming through torch.distributed, on 2 and 4 processes."""

from __future__ import annotations

import errno

import pytest
import torch

from moe_dist.checkpoint import (
    CheckpointError,
    TorchGroup,
    find_latest,
    open_checkpoint,
    prune,
    save,
    writer,
)
from tests.checkpoint.worlds import KINDS, World, catalogue, truth


def save_on_rank(root: str, step: int, layout: tuple[int, int]) -> str:
    group, world = TorchGroup(), World(*layout)
    pieces = world.fragments(group.rank, truth())
    state = {"step": step}
    return str(save(root, step, pieces, state, catalogue=catalogue(), group=group))


def load_on_rank(root: str, layout: tuple[int, int]) -> tuple[str, bool]:
    group, world = TorchGroup(), World(*layout, seed=3)
    found = find_latest(root, group=group)
    with open_checkpoint(found.path) as checkpoint:
        equal = True
        for kind in KINDS:
            whole = world.shard(group.rank, truth(), kind)
            flat = torch.zeros_like(whole)
            checkpoint.fill(kind, world.places(group.rank), flat)
            equal = equal and torch.equal(flat, whole)
    return found.path.name, equal


@pytest.mark.parametrize(
    ("written", "read"), [((2, 1), (2, 2)), ((2, 2), (1, 2)), ((1, 4), (4, 1)), ((4, 1), (2, 1))], ids=str
)
def test_what_some_ranks_wrote_any_other_number_reads(ranks, tmp_path, written, read):
    size, other = written[0] * written[1], read[0] * read[1]
    assert set(ranks(size, save_on_rank, str(tmp_path), 5, written)) == {str(tmp_path / "step-5")}
    assert set(ranks(other, load_on_rank, str(tmp_path), read)) == {("step-5", True)}


def fail_on_rank(root: str, victim: int) -> tuple[str, str]:
    group, world = TorchGroup(), World(2, 1)
    kept = writer.write_layout

    def full(path, layout):
        raise OSError(errno.ENOSPC, "No space left on device")

    if group.rank == victim:
        writer.write_layout = full
    try:
        save(root, 9, world.fragments(group.rank, truth()), {}, catalogue=catalogue(), group=group)
    except CheckpointError as error:
        return type(error).__name__, str(error)
    finally:
        writer.write_layout = kept
    return "", ""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_under_one_rank_is_the_same_error_on_both_and_the_run_can_go_on(ranks, tmp_path, victim):
    ranks(2, save_on_rank, str(tmp_path), 5, (2, 1))
    errors = ranks(2, fail_on_rank, str(tmp_path), victim)
    assert errors[0] == errors[1]
    kind, message = errors[0]
    assert kind == "NoSpaceError"
    assert f"checkpoint step 9 was not saved: rank {victim}: no space in {tmp_path}" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-5"]
    ranks(2, save_on_rank, str(tmp_path), 10, (2, 1))
    assert find_latest(tmp_path).path == tmp_path / "step-10"


def prune_on_rank(root: str) -> list[str]:
    return prune(root, keep=1, group=TorchGroup())


def test_pruning_is_agreed(ranks, tmp_path):
    for step in (1, 2, 3):
        ranks(2, save_on_rank, str(tmp_path), step, (2, 1))
    assert ranks(2, prune_on_rank, str(tmp_path)) == [["step-2", "step-1"]] * 2
