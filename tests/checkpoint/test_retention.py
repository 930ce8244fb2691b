"""Removing old checkpoints without ever removing the last that works."""

from __future__ import annotations

import pytest

from moe_dist.checkpoint import find_latest, pin, prune
from tests.checkpoint.damage import flip
from tests.checkpoint.worlds import World, on_threads, saved, truth

WORLD = World(1, 2)


@pytest.fixture
def root(tmp_path):
    for step in (1, 2, 3, 4):
        saved(tmp_path, step, WORLD, truth())
    return tmp_path


def steps(root):
    return [int(path.name[5:]) for path in sorted(root.glob("step-?"))]


def test_the_newest_stay_and_all_ranks_know_what_went(root):
    removed = on_threads(2, lambda group: prune(root, keep=2, group=group))
    assert removed == [["step-2", "step-1"]] * 2
    assert steps(root) == [3, 4]


def test_newest_is_what_was_saved_last(root):
    saved(root, 0, WORLD, truth())
    prune(root, keep=2)
    assert steps(root) == [0, 4]


def test_pinned_ones_stay(root):
    pin(root / "step-1")
    assert prune(root, keep=1) == ["step-3", "step-2"]
    assert steps(root) == [1, 4]


def test_the_last_good_one_stays_when_the_newer_are_damaged(root):
    flip(root / "step-4" / "rank-00000.safetensors")
    flip(root / "step-3" / "rank-00001.json")
    assert prune(root, keep=2) == ["step-1"]
    assert steps(root) == [2, 3, 4]
    assert find_latest(root).path == root / "step-2"


def test_nothing_goes_when_none_is_good(root):
    for step in (1, 2, 3, 4):
        flip(root / f"step-{step}" / "tensors.json")
    assert prune(root, keep=1) == []
    assert steps(root) == [1, 2, 3, 4]


def test_torn_folders_neither_count_nor_go(root):
    (root / "step-4" / "manifest.json").unlink()
    assert prune(root, keep=2) == ["step-1"]
    assert steps(root) == [2, 3, 4]


def test_nothing_goes_while_a_save_is_under_way(root):
    (root / "step-5.tmp-0123abcd").mkdir()
    assert prune(root, keep=1) == []
    assert steps(root) == [1, 2, 3, 4]


def test_few_or_none(root, tmp_path):
    assert prune(root, keep=4) == []
    assert prune(tmp_path / "absent", keep=1) == []
