"""Leftovers, damage, full disks and slow file systems, seen from a run."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from moe_dist import checkpoint
from moe_dist.checkpoint import CheckpointError
from moe_dist.checkpoint.folders import wait_until_visible
from moe_dist.errors import EXIT_OK, EXIT_USER
from moe_dist.train.metrics import MetricLog
from tests.checkpoint.damage import flip, swap
from tests.run.processes import write_config
from tests.run.runs import assert_same_bits, events, make_files, settings, stored, train
from tests.run.test_bad_input import called

PATIENCE = 240
STEPS = 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")


def run_settings(files: Path, run: Path, **section) -> dict:
    section = {"every": 1, "keep": 9, **section}
    return settings(files, run, "qwen3_moe", parallel={"expert": 2}, train={"steps": STEPS}, checkpoint=section)


@pytest.fixture(scope="module")
def whole(ranks, files) -> Path:
    run = files / "whole"
    assert ranks(2, train, run_settings(files, run), timeout=PATIENCE) == [EXIT_OK] * 2
    return run


def test_fault_02_a_torn_folder_of_a_step_that_is_reached_again(ranks, files, whole, tmp_path):
    run = tmp_path / "run"
    tree = run_settings(files, run)
    assert ranks(2, train, {**tree, "train": {**tree["train"], "stop_at": 1}}, timeout=PATIENCE) == [EXIT_OK] * 2
    for name in ("step-2", "step-2.tmp-0123abcd", "step-3.tmp-0123abcd"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "rank-00000.safetensors").write_bytes(b"half")
    assert ranks(2, train, tree, timeout=PATIENCE) == [EXIT_OK] * 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-1", "step-2", "step-3"]
    assert_same_bits(stored(run, 2), stored(whole, 2))
    assert_same_bits(stored(run, STEPS), stored(whole, STEPS))


def flipped(folder: Path) -> str:
    flip(folder / "rank-00001.safetensors", 4000)
    return "rank-00001.safetensors: its content is not what was saved"


def emptied(folder: Path) -> str:
    (folder / "rank-00000.safetensors").write_bytes(b"")
    return "rank-00000.safetensors: 0 bytes instead of "


def lost(folder: Path) -> str:
    (folder / "rank-00001.safetensors").unlink()
    return "rank-00001.safetensors: missing"


def swapped(folder: Path) -> str:
    swap(folder / "rank-00000.safetensors", folder / "rank-00001.safetensors")
    return "rank-00000.safetensors: "


@pytest.mark.parametrize("harm", [flipped, emptied, lost, swapped], ids=lambda harm: harm.__name__)
def test_fault_03_damage_is_named_passed_over_and_refused(ranks, files, whole, tmp_path, harm):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    said = harm(run / "checkpoints" / f"step-{STEPS}")
    file = str(write_config(run_settings(files, run), tmp_path / "c.yaml"))
    damaged = str(run / "checkpoints" / f"step-{STEPS}")
    results = ranks(
        2,
        called,
        ["train", file, "--resume", damaged],
        ["train", file],
        ["ckpt", "verify", str(run)],
        timeout=PATIENCE,
    )
    for asked, resumed, verified in results:
        assert asked[0] == EXIT_USER, asked[2]
        assert said in asked[2]
        assert "Traceback" not in asked[2]
        assert resumed[0] == EXIT_OK, resumed[2]
        assert verified[0] == EXIT_OK  # the step was saved anew
    assert f"warning: step-{STEPS} is passed over: " in results[0][1][2]
    assert_same_bits(stored(run, STEPS), stored(whole, STEPS))


def test_fault_03_verify_says_which_file(ranks, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    said = flipped(run / "checkpoints" / "step-2")
    ((code, out, _),) = ranks(1, called, ["ckpt", "verify", str(run)], timeout=PATIENCE)[0]
    assert code == EXIT_USER
    assert said in out
    assert out.count("whole, ") == STEPS - 1


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system of its own")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill_up(ballast: str) -> None:
    """Leave room for figures, and none for a checkpoint."""
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    os.truncate(ballast, os.stat(ballast).st_size - 60_000)


def train_with_ballast(tree: dict, ballast: str) -> int | str:
    """On each rank: a run whose disk is full before step 2 is saved, and gets room again once that has failed."""
    write = MetricLog.write

    def watching(log, event, step, **values):
        write(log, event, step, **values)
        if event == "train" and step == 2:
            fill_up(ballast)
        if event == "checkpoint_failed":
            Path(ballast).unlink(missing_ok=True)

    with patch.object(MetricLog, "write", watching):
        try:
            return train(tree)
        except CheckpointError as error:
            return str(error)


@pytest.mark.parametrize("policy", ["stop", "continue"])
@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_fault_04_a_full_disk_follows_the_policy(ranks, files, whole, tmp_path, small_disk, policy, background):
    run, ballast = small_disk / "run", small_disk / "ballast"
    # By itself, so that no save is under way when the disk gets full.
    first = run_settings(files, run, background=background, on_error=policy)
    first["train"]["stop_at"] = 1
    assert ranks(2, train, first, timeout=PATIENCE) == [EXIT_OK] * 2
    results = ranks(
        2,
        train_with_ballast,
        run_settings(files, run, background=background, on_error=policy),
        str(ballast),
        timeout=PATIENCE,
    )
    assert results[0] == results[1]
    if policy == "stop":
        said = results[0]
        assert (run / "checkpoints" / "latest").read_text() == "step-1\n"
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-1"]
    else:
        assert results[0] == EXIT_OK
        (failed,) = events(run, "checkpoint_failed")
        said = failed["error"]
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-1", "step-3"]
        assert_same_bits(stored(run, STEPS), stored(whole, STEPS))
    assert "checkpoint step 2 was not saved" in said
    assert "bytes needed" in said
    assert "free" in said
    assert_same_bits(stored(run, 1), stored(whole, 1))


def test_fault_05_what_another_rank_made_may_appear_late(tmp_path):
    late = tmp_path / "late"
    threading.Timer(0.4, lambda: late.write_bytes(b"1234")).start()
    started = time.monotonic()
    wait_until_visible(late, seconds=20, size=4)
    assert 0.3 < time.monotonic() - started < 10


def test_fault_05_a_stale_handle_is_waited_for_and_then_told(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"1234")
    real, left = Path.stat, [4]

    def stale(path, **options):
        left[0] -= 1
        if path == file and left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return real(path, **options)

    with patch.object(Path, "stat", stale):
        wait_until_visible(file, seconds=20, size=4)
        left[0] = 1_000_000
        started = time.monotonic()
        with pytest.raises(CheckpointError, match=r"file is not visible after 0\.3 s"):
            wait_until_visible(file, seconds=0.3)
    assert time.monotonic() - started < 10


def test_fault_05_an_unreadable_checkpoint_is_passed_over_on_all_ranks(ranks, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert ranks(2, found_where_one_cannot_read, str(run / "checkpoints"), timeout=PATIENCE) == ["step-2"] * 2


def found_where_one_cannot_read(root: str) -> str:
    """On each rank: what it finds, where reading of step 3 fails on rank 1 alone."""
    import builtins

    import torch.distributed as dist

    real = builtins.open

    def failing(file, *words, **more):
        if dist.get_rank() == 1 and f"step-{STEPS}" in str(file) and str(file).endswith(".safetensors"):
            raise OSError(errno.EIO, "Input/output error", str(file))
        return real(file, *words, **more)

    with patch.object(builtins, "open", failing):
        return checkpoint.find_latest(root, group=checkpoint.TorchGroup()).path.name
