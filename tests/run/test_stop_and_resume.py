"""A run that is told to stop, or loses a rank, and goes on by the same command: as if nothing had happened."""

from __future__ import annotations

import signal
import time
from os import kill
from pathlib import Path

import pytest

from moe_dist import checkpoint
from moe_dist.errors import EXIT_OK, EXIT_PREEMPTED, EXIT_TRANSIENT
from tests.run.processes import bare_ranks, end, torchrun, trained_steps, wait_for_step, workers, write_config
from tests.run.runs import assert_same_bits, events, make_files, settings, stored, train, trainer_state

STEPS, EVERY = 50, 8
FIGURES = ("train", "eval", "skipped")
PATIENCE = 400  # seconds for a run with all its imports, on a machine that may be busy with other work

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")


@pytest.fixture(scope="module")
def uninterrupted(ranks, files) -> Path:
    run = files / "uninterrupted"
    assert ranks(2, train, run_settings(files, run), timeout=PATIENCE) == [EXIT_OK] * 2
    return run


def run_settings(files: Path, run: Path) -> dict:
    return settings(
        files,
        run,
        "qwen3_moe",
        data={"eval": {"held": {"path": str(files / "text.jsonl"), "limit": 6}}},
        parallel={"expert": 2, "zero_stage": 1},
        moe={"balance_loss": "layer_global"},
        train={"steps": STEPS, "precision": "bf16", "eval_every": 10},
        checkpoint={"every": EVERY},
    )


def assert_as_if_uninterrupted(run: Path, uninterrupted: Path) -> None:
    assert_same_bits(stored(run, STEPS), stored(uninterrupted, STEPS))
    assert trainer_state(run, STEPS) == trainer_state(uninterrupted, STEPS)
    assert trained_steps(run) == list(range(1, STEPS + 1))
    assert events(run, *FIGURES) == events(uninterrupted, *FIGURES)


def test_a_signal_to_one_rank_saves_on_all(files, uninterrupted, tmp_path):
    run, code = tmp_path / "run", tmp_path / "exit"
    words = ("train", str(write_config(run_settings(files, run), tmp_path / "c.yaml")))
    launcher = torchrun(2, *words, cwd=tmp_path, MOE_DIST_EXIT_FILE=str(code))
    try:
        wait_for_step(run, 3, [launcher], seconds=PATIENCE)
        kill(workers(launcher)[1], signal.SIGTERM)
        launcher.wait(timeout=PATIENCE)
    finally:
        end([launcher])
    output = (tmp_path / "output.txt").read_text()
    assert code.read_text() == str(EXIT_PREEMPTED), output
    assert launcher.returncode != EXIT_OK
    stopped = trained_steps(run)[-1]
    assert 3 <= stopped < STEPS
    assert f"stopped on request at step {stopped}" in output
    newest = checkpoint.find_latest(run / "checkpoints")
    assert newest.path == run / "checkpoints" / f"step-{stopped}"
    assert newest.notes == ()

    again = torchrun(2, *words, cwd=tmp_path)
    try:
        assert again.wait(timeout=PATIENCE) == EXIT_OK, (tmp_path / "output.txt").read_text()
    finally:
        end([again])
    assert_as_if_uninterrupted(run, uninterrupted)


def test_a_killed_rank_ends_the_run_in_bounded_time(files, uninterrupted, tmp_path):
    run = tmp_path / "run"
    words = ("train", str(write_config(run_settings(files, run), tmp_path / "c.yaml")))
    processes = bare_ranks(2, *words, cwd=tmp_path)
    try:
        wait_for_step(run, EVERY + 2, processes, seconds=PATIENCE)
        processes[1].kill()
        killed = time.monotonic()
        code = processes[0].wait(timeout=60)
        assert time.monotonic() - killed < 60
    finally:
        end(processes)
    assert code == EXIT_TRANSIENT, (tmp_path / "output.txt").read_text()
    reached = trained_steps(run)[-1]
    assert EVERY < reached < STEPS
    newest = checkpoint.find_latest(run / "checkpoints").path

    again = bare_ranks(2, *words, cwd=tmp_path)
    try:
        codes = [process.wait(timeout=PATIENCE) for process in again]
    finally:
        end(again)
    output = (tmp_path / "output.txt").read_text()
    assert codes == [EXIT_OK] * 2, output
    assert f"resuming tiny from {newest}" in output
    assert_as_if_uninterrupted(run, uninterrupted)
