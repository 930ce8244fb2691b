"""The best checkpoint: named by one small file, spared by retention, never silently another one."""

from __future__ import annotations

import pytest

from moe_dist.checkpoint import CheckpointError, best_step, find_latest, ls, mark_best, prune
from moe_dist.checkpoint.folders import clear_stale
from tests.checkpoint.worlds import World, on_threads, saved, truth

WORLD = World(1, 2)


@pytest.fixture
def root(tmp_path):
    for step in (1, 2, 3, 4):
        saved(tmp_path, step, WORLD, truth())
    return tmp_path


def steps(root):
    return [int(path.name[5:]) for path in sorted(root.glob("step-?"))]


def test_all_ranks_read_what_one_wrote(root):
    assert best_step(root) is None
    on_threads(2, lambda group: mark_best(root, 2, group=group))
    assert on_threads(2, lambda group: best_step(root, group=group)) == [2, 2]
    assert (root / "best").read_text() == "step-2\n"
    mark_best(root, 3)
    assert best_step(root) == 3
    assert [entry.step for entry in ls(root) if entry.best] == [3]
    mark_best(root, None)
    assert best_step(root) is None


def test_retention_spares_it_and_resuming_does_not_take_it(root):
    mark_best(root, 1)
    assert prune(root, keep=2) == ["step-2"]
    assert steps(root) == [1, 3, 4]
    assert find_latest(root).path == root / "step-4"
    mark_best(root, 4)
    assert prune(root, keep=2) == ["step-1"]


def test_it_names_only_what_is_there(root):
    with pytest.raises(CheckpointError, match="step-7 is not there"):
        mark_best(root, 7)
    assert not (root / "best").exists()
    for said in ("step-7", "", "../step-2", "manifest.json"):
        (root / "best").write_text(said)
        with pytest.raises(CheckpointError, match="which is no checkpoint there; name a checkpoint"):
            best_step(root)
    assert prune(root, keep=2) == ["step-2", "step-1"]


def test_what_a_killed_move_left_is_cleared(root):
    mark_best(root, 2)
    (root / "best.tmp-0123abcd").write_text("step-3\n")
    clear_stale(root)
    assert not (root / "best.tmp-0123abcd").exists()
    assert best_step(root) == 2
