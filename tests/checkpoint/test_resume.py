"""Which checkpoint a run goes on from, whatever is in its folder."""

from __future__ import annotations

import pytest

from moe_dist.checkpoint import CheckpointError, find_latest, ls, pin
from moe_dist.checkpoint.format import MANIFEST
from tests.checkpoint.damage import flip
from tests.checkpoint.worlds import World, on_threads, saved, truth

WORLD = World(2, 1)


@pytest.fixture
def root(tmp_path):
    for step in (10, 20):
        saved(tmp_path, step, WORLD, truth())
    return tmp_path


def test_nothing_to_find(tmp_path):
    assert find_latest(tmp_path / "absent") == find_latest(tmp_path)
    assert find_latest(tmp_path).path is None
    assert find_latest(tmp_path).notes == ()


def test_the_newest_without_a_word(root):
    found = find_latest(root)
    assert found.path == root / "step-20"
    assert found.notes == ()


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (None, "`latest` is missing"),
        (b"", "`latest` is empty"),
        (b"\n \n", "`latest` is empty"),
        (b"step-30\n", "`latest` says step-30, which does not exist"),
        (b"../step-10\n", "`latest` says '../step-10', which is no step folder"),
        (b"../../etc\n", "which is no step folder"),
        (b"/etc\n", "which is no step folder"),
        (b"step-010\n", "which is no step folder"),
        (b"\xff\xfe", "`latest` is not readable"),
    ],
)
def test_a_useless_latest_falls_back_to_the_folders_and_says_why(root, content, note):
    if content is None:
        (root / "latest").unlink()
    else:
        (root / "latest").write_bytes(content)
    found = find_latest(root)
    assert found.path == root / "step-20"
    assert len(found.notes) == 1
    assert note in found.notes[0]
    assert found.notes[0].endswith("the folders were looked through instead")


def test_a_kill_before_latest_moved_does_not_lose_the_step(root):
    (root / "latest").write_text("step-10\n")
    found = find_latest(root)
    assert found.path == root / "step-20"
    assert found.notes == ("`latest` says step-10, but step-20 was saved after it",)


def test_after_going_back_the_newest_is_what_was_saved_last(root):
    saved(root, 15, WORLD, truth())  # a run resumed from step 10 by hand
    (root / "latest").unlink()
    assert find_latest(root).path == root / "step-15"


def test_a_damaged_checkpoint_is_passed_over_by_all_ranks_alike(root):
    flip(root / "step-20" / "rank-00001.safetensors")
    for found in on_threads(3, lambda group: find_latest(root, group=group)):
        assert found.path == root / "step-10"
        assert "step-20 is passed over: rank-00001.safetensors: its content" in found.notes[0]
    assert find_latest(root, verify="sizes").path == root / "step-20"


@pytest.mark.parametrize("name", [MANIFEST, "rank-00000.safetensors"])
def test_a_torn_folder_is_passed_over_reported_and_left_for_its_owner(root, name):
    (root / "step-20" / name).unlink()
    found = find_latest(root)
    assert found.path == root / "step-10"
    assert found.notes[0].startswith("step-20 is passed over")
    assert name in found.notes[0]
    assert (root / "step-20").is_dir()


def test_when_nothing_is_whole_there_is_nothing_and_every_reason_is_told(root):
    flip(root / "step-10" / "tensors.json")
    (root / "step-20" / "rank-00000.json").write_bytes(b"")
    found = find_latest(root)
    assert found.path is None
    assert any("step-10 is passed over: tensors.json" in note for note in found.notes)
    assert any("rank-00000.json: 0 bytes" in note for note in found.notes)


def test_a_link_out_of_the_run_is_no_checkpoint(root, tmp_path_factory):
    outside = saved(tmp_path_factory.mktemp("other"), 99, WORLD, truth())
    (root / "step-99").symlink_to(outside)
    (root / "latest").write_text("step-99\n")
    assert find_latest(root).path == root / "step-20"
    assert "step-99" not in [entry.name for entry in ls(root)]


def test_leftovers_of_a_save_are_cleared_and_reported(root):
    (root / "step-30.tmp-0123abcd").mkdir()
    (root / "step-30.tmp-0123abcd" / "rank-00000.safetensors").write_bytes(b"half")
    (root / "latest.tmp-0123abcd").write_text("step-")
    found = find_latest(root, clear=True)
    assert found.path == root / "step-20"
    assert found.notes == ("step-30.tmp-0123abcd was removed: a save that was cut off left it",)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-10", "step-20"]


def test_a_reader_leaves_the_save_of_a_running_job_alone(root):
    (root / "step-30.tmp-0123abcd").mkdir()
    assert find_latest(root).path == root / "step-20"
    assert (root / "step-30.tmp-0123abcd").is_dir()


def test_what_is_not_ours_is_not_touched(root):
    for name in ("notes.tmp-1", "step-30.tmp-xyz", "step-x.tmp-00"):
        (root / name).mkdir()
    find_latest(root, clear=True)
    assert {"notes.tmp-1", "step-30.tmp-xyz", "step-x.tmp-00"} <= {path.name for path in root.iterdir()}


def test_a_step_that_had_stepped_aside_comes_back(root):
    (root / "step-20").rename(root / "step-20.old-0123abcd")
    found = find_latest(root, clear=True)
    assert found.path == root / "step-20"
    assert found.notes == ("step-20 was put back: the save that was to replace it was cut off",)


def test_a_step_that_was_replaced_is_removed(root):
    (root / "step-10").rename(root / "step-20.old-0123abcd")
    assert find_latest(root, clear=True).path == root / "step-20"
    assert not (root / "step-20.old-0123abcd").exists()


def test_ls_shows_every_folder_with_its_state(root):
    saved(root, 5, WORLD, truth())
    (root / "step-20" / MANIFEST).unlink()
    (root / "step-30.tmp-0123abcd").mkdir()
    pin(root / "step-10")
    rows = [(e.name, e.step, e.latest, e.pinned, e.problem is None) for e in ls(root)]
    assert rows == [
        ("step-5", 5, True, False, True),
        ("step-10", 10, False, True, True),
        ("step-20", 20, False, False, False),
        ("step-30.tmp-0123abcd", 30, False, False, False),
    ]
    assert ls(root)[0].bytes > 1000
    with pytest.raises(CheckpointError, match="no such folder"):
        ls(root / "absent")
