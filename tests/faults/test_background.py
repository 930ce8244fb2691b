"""Saves that are written while training goes on: the same bytes, and never anything but whole or absent."""

from __future__ import annotations

import errno
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest

from moe_dist import checkpoint
from moe_dist.checkpoint import BackgroundSave, CheckpointError, prune, writer
from moe_dist.checkpoint.format import TRAINER_STATE, read_manifest
from moe_dist.errors import EXIT_OK, EXIT_PREEMPTED
from tests.checkpoint.damage import flip
from tests.checkpoint.worlds import World, catalogue, on_threads, saved, truth
from tests.run.runs import assert_same_bits, events, make_files, settings, stored, train, trainer_state

STEPS = 6
SLOW_S = 0.4  # longer than a step takes
PATIENCE = 240
WORLD = World(2, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")


def run_settings(files: Path, run: Path, **section) -> dict:
    section = {"every": 1, "keep": 20, "background": True, **section}
    return settings(files, run, "qwen3_moe", parallel={"expert": 2}, train={"steps": STEPS}, checkpoint=section)


@pytest.fixture(scope="module")
def at_once(ranks, files) -> Path:
    run = files / "at_once"
    assert ranks(2, train, run_settings(files, run, background=False), timeout=PATIENCE) == [EXIT_OK] * 2
    return run


def disturbed_train(tree: dict, how: str, run: str = "") -> int | str:
    """On each rank: a run whose writer is slow, and what it ended with."""
    import torch.distributed as dist

    real, rank = writer.write_layout, dist.get_rank()

    def write(path, layout):
        time.sleep(SLOW_S)
        step = path.parent.name.partition(".")[0]
        if how == "asked to stop" and step == "step-2" and rank == 0:
            (Path(run) / "launch").mkdir(exist_ok=True)
            (Path(run) / "launch" / "stop").touch()
        record = real(path, layout)
        if how == "failing" and step == "step-2" and rank == 1:
            raise OSError(errno.EIO, "Input/output error", str(path))
        if how == "damaged" and step == "step-2" and rank == 1:
            flip(path)
        return record

    with ExitStack() as patches:
        patches.enter_context(patch.object(writer, "write_layout", write))
        try:
            return train(tree)
        except CheckpointError as error:
            return str(error)


def steps_in(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def assert_whole(run: Path) -> None:
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert not [name for name in names if "." in name], f"left behind: {names}"
    for step in steps_in(run):
        assert checkpoint.verify(run / "checkpoints" / f"step-{step}").ok


def test_fault_07_the_same_bytes_as_at_once_and_a_save_waits_for_the_one_before(ranks, files, at_once, tmp_path):
    run = tmp_path / "run"
    assert ranks(2, disturbed_train, run_settings(files, run), "slow", timeout=PATIENCE) == [EXIT_OK] * 2
    assert steps_in(run) == list(range(1, STEPS + 1))
    assert_whole(run)
    for step in steps_in(run):
        ours, theirs = (read_manifest(place / "checkpoints" / f"step-{step}") for place in (run, at_once))
        assert ours.serial == theirs.serial
        # The trainer's state holds the configuration, which says how it is saved.
        assert ours.files.pop(TRAINER_STATE) != theirs.files.pop(TRAINER_STATE)
        assert ours.files == theirs.files
        assert trainer_state(run, step) == trainer_state(at_once, step)


def test_fault_07_training_goes_on_while_it_is_written(ranks, files, at_once, tmp_path):
    run = tmp_path / "run"
    tree = run_settings(files, run, every=2)
    assert ranks(2, disturbed_train, tree, "slow", timeout=PATIENCE) == [EXIT_OK] * 2
    assert events(run, "train") == events(at_once, "train")
    assert_same_bits(stored(run, 2), stored(at_once, 2))  # what was copied, not what it has become since


def test_fault_07_a_failing_thread_stops_the_run_at_the_next_step(ranks, files, tmp_path):
    run = tmp_path / "run"
    messages = ranks(2, disturbed_train, run_settings(files, run), "failing", timeout=PATIENCE)
    assert messages[0] == messages[1]
    assert "checkpoint step 2 was not saved: rank 1: " in messages[0]
    assert "Input/output error" in messages[0]
    assert [line["step"] for line in events(run, "train")][-1] == 3  # the one that was computed meanwhile
    assert steps_in(run) == [1]
    assert_whole(run)
    assert (run / "checkpoints" / "latest").read_text() == "step-1\n"


def test_fault_07_what_does_not_read_back_is_not_saved(ranks, files, tmp_path):
    run = tmp_path / "run"
    messages = ranks(2, disturbed_train, run_settings(files, run), "damaged", timeout=PATIENCE)
    assert messages[0] == messages[1]
    assert "reads back otherwise than it was written" in messages[0]
    assert steps_in(run) == [1]


def test_fault_07_a_failing_thread_is_left_out_where_the_configuration_says_so(ranks, files, at_once, tmp_path):
    run = tmp_path / "run"
    tree = run_settings(files, run, on_error="continue")
    assert ranks(2, disturbed_train, tree, "failing", timeout=PATIENCE) == [EXIT_OK] * 2
    assert steps_in(run) == [step for step in range(1, STEPS + 1) if step != 2]
    assert_whole(run)
    (failed,) = events(run, "checkpoint_failed")
    assert failed["step"] == 2
    assert "Input/output error" in failed["error"]
    assert_same_bits(stored(run, STEPS), stored(at_once, STEPS))


def test_fault_07_a_stop_waits_for_it(ranks, files, tmp_path):
    run = tmp_path / "run"
    tree = run_settings(files, run, every=2)
    assert ranks(2, disturbed_train, tree, "asked to stop", str(run), timeout=PATIENCE) == [EXIT_PREEMPTED] * 2
    reached = [line["step"] for line in events(run, "train")][-1]
    assert 2 <= reached < STEPS
    assert steps_in(run) == sorted({2, reached})
    assert_whole(run)
    assert (run / "checkpoints" / "latest").read_text() == f"step-{reached}\n"


def test_fault_08_nothing_is_removed_while_a_save_is_in_flight(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step, WORLD, truth())

    def work(group):
        pieces = WORLD.fragments(group.rank, truth())
        under_way = BackgroundSave(tmp_path, 4, pieces, {}, catalogue=catalogue(), group=group)
        early = prune(tmp_path, keep=1, group=group)
        path = under_way.commit()
        return early, prune(tmp_path, keep=1, whole=path.name, group=group)

    assert on_threads(2, work) == [([], ["step-3", "step-2", "step-1"])] * 2
    assert checkpoint.find_latest(tmp_path).path == tmp_path / "step-4"
