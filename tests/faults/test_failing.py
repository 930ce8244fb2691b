"""Ranks that raise, crash, hang, stop, drift and lag: all end in bounded time, and one line names the culprit."""

from __future__ import annotations

import os
import re
import signal
import socket
import time

import pytest

from moe_dist.errors import EXIT_OK, EXIT_TRANSIENT
from moe_dist.launch.processes import descendants
from tests.faults.harm import HANG_TIMEOUT, KINDS, PLACES, STACKLESS, at_place, harm, harm_a_forward
from tests.run.forked import Ranks
from tests.run.processes import write_config
from tests.run.runs import events, make_files, settings

WITHIN = 60  # seconds, of which start-up takes some and waiting for a hang HANG_TIMEOUT
HOST = socket.gethostname()

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")


def run_settings(files, run, **sections) -> dict:
    sections["launch"] = {"hang_timeout": HANG_TIMEOUT, **sections.get("launch", {})}
    return settings(
        files,
        run,
        "qwen3_moe",
        data={"eval": {"held": {"path": str(files / "text.jsonl"), "limit": 6}}},
        parallel={"expert": 2, "zero_stage": 1},
        train={"steps": 6, "eval_every": 5, **sections.pop("train", {})},
        checkpoint={"every": 4},
        **sections,
    )


# Every kind in forward, and every other place with a rank that vanishes and one that hangs.
CASES = [(kind, "forward", 1) for kind in KINDS]
CASES += [(kind, place, 1) for place in PLACES if place != "forward" for kind in ("kill", "hang")]
CASES += [("exception", "backward", 0), ("kill", "forward", 0), ("stop", "forward", 0), ("hang", "data", 0)]
IN_SUITE = [("exception", "forward", 1), ("segfault", "forward", 1), ("kill", "data", 1), ("GIL", "forward", 1)]


@pytest.mark.parametrize(
    ("kind", "place", "victim"),
    [
        pytest.param(
            *case, marks=() if case in IN_SUITE else pytest.mark.report_only, id=f"{case[0]}-{case[1]}-{case[2]}"
        )
        for case in CASES
    ],
)
def test_fault_21_a_rank_fails(files, tmp_path, kind, place, victim):
    run = tmp_path / "run"
    words = ("train", str(write_config(run_settings(files, run), tmp_path / "c.yaml")))
    start = time.monotonic()
    with Ranks(2, words, tmp_path / "output", before=harm, args=(victim, kind, place)) as ranks:
        codes = ranks.wait(WITHIN)
        text = ranks.text
    assert time.monotonic() - start < WITHIN, text
    assert None not in codes, (codes, text)
    assert codes[victim] != EXIT_OK or kind == "exit", (codes, text)
    assert codes[1 - victim] == EXIT_TRANSIENT, (codes, text)
    lines = [line for line in text.splitlines() if re.match(rf"moe-dist: rank \d+ on {HOST} ", line)]
    assert len(lines) == 1, text
    assert lines[0].startswith(f"moe-dist: rank {victim} on {HOST} {KINDS[kind][1]}"), lines
    assert PLACES[place] in lines[0], lines
    log = run / "logs/attempt-1" / f"rank-{victim}.log"
    assert str(log) in lines[0]
    end = time.monotonic() + 5
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert lines[0].removeprefix("moe-dist: ") in log.read_text()
    if kind not in STACKLESS:
        assert "tests/faults/harm.py" in log.read_text()


STAGES = [(kind, call, victim) for kind in ("exception", "kill", "hang") for call in (5, 6) for victim in (0, 1)]
STAGES_IN_SUITE = [("exception", 6, 1), ("hang", 5, 0)]


@pytest.mark.parametrize(
    ("kind", "call", "victim"),
    [pytest.param(*case, marks=() if case in STAGES_IN_SUITE else pytest.mark.report_only) for case in STAGES],
)
def test_fault_21_a_pipeline_stage_fails(files, tmp_path, kind, call, victim):
    """In the forward of the first or second of four micro-batches of the second step."""
    tree = run_settings(files, tmp_path / "run")
    tree["parallel"] = {"pipeline": 2}
    words = ("train", str(write_config(tree, tmp_path / "c.yaml")))
    with Ranks(2, words, tmp_path / "output", before=harm_a_forward, args=(victim, kind, call)) as ranks:
        codes = ranks.wait(WITHIN)
        text = ranks.text
    assert None not in codes, (codes, text)
    assert codes[victim] != EXIT_OK, (codes, text)
    assert codes[1 - victim] == EXIT_TRANSIENT, (codes, text)
    lines = [line for line in text.splitlines() if re.match(rf"moe-dist: rank \d+ on {HOST} ", line)]
    assert len(lines) == 1, text
    assert lines[0].startswith(f"moe-dist: rank {victim} on {HOST} {KINDS[kind][1]}"), lines
    assert "step 2, forward" in lines[0]


@pytest.mark.report_only
@pytest.mark.parametrize(("victim", "line"), [(0, "the host of rank 0 ("), (1, f"rank 1 on {HOST} is gone, and what")])
def test_fault_21_a_host_is_lost(files, tmp_path, victim, line):
    """A rank and its watcher, at once and without a word."""
    words = ("train", str(write_config(run_settings(files, tmp_path / "run"), tmp_path / "c.yaml")))
    with Ranks(2, words, tmp_path / "output", before=lose_the_host, args=(victim,)) as ranks:
        codes = ranks.wait(WITHIN)
        text = ranks.text
    assert codes[1 - victim] == EXIT_TRANSIENT, (codes, text)
    assert sum(one.startswith(f"moe-dist: {line}") for one in text.splitlines()) == 1, text


def lose_the_host(rank: int, victim: int) -> None:
    def lose() -> None:
        for pid in [*descendants(os.getpid()), os.getpid()]:
            os.kill(pid, signal.SIGKILL)

    if rank == victim:
        at_place(rank, "forward", lose, 3)


def test_fault_22_a_rank_that_leaves_out_a_collective(files, tmp_path):
    """It goes on where the others wait, and waits for what they do not do."""
    words = ("train", str(write_config(run_settings(files, tmp_path / "run"), tmp_path / "c.yaml")))
    with Ranks(2, words, tmp_path / "output", before=skip_a_collective) as ranks:
        codes = ranks.wait(WITHIN)
        text = ranks.text
    assert None not in codes, text
    assert EXIT_OK not in codes, (codes, text)
    assert "moe-dist: " in text


def skip_a_collective(rank: int) -> None:
    from moe_dist.train import loop

    original, calls = loop.agree, []

    def agree(batches, stop, votes, grid):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            return 20, 20, False, 0
        return original(batches, stop, votes, grid)

    loop.agree = agree


def test_fault_21_the_watchers_are_gone_after_all_has_ended(files, tmp_path):
    words = ("train", str(write_config(run_settings(files, tmp_path / "run"), tmp_path / "c.yaml")))
    with Ranks(2, words, tmp_path / "output", before=note_watchers, args=(str(tmp_path),)) as ranks:
        assert ranks.wait(WITHIN) == [EXIT_OK] * 2, ranks.text
    assert not (tmp_path / "run/logs").exists()
    watchers = [int(path.read_text()) for path in tmp_path.glob("watcher-*")]
    assert len(watchers) == 2
    end = time.monotonic() + 10
    while any(alive(pid) for pid in watchers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in watchers)


def note_watchers(rank: int, folder: str) -> None:
    from moe_dist.launch.guard import rank as side

    original = side.subprocess.Popen

    def popen(command, **options):
        process = original(command, **options)
        if "watcher" in str(command):
            with open(f"{folder}/watcher-{rank}", "w") as file:
                file.write(str(process.pid))
        return process

    side.subprocess.Popen = popen


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_fault_25_a_slow_rank_is_reported(files, tmp_path):
    run = tmp_path / "run"
    tree = run_settings(files, run, train={"steps": 45, "eval_every": 0})
    words = ("train", str(write_config(tree, tmp_path / "c.yaml")))
    with Ranks(2, words, tmp_path / "output", before=slow_down, args=(1, 0.25)) as ranks:
        assert ranks.wait(WITHIN) == [EXIT_OK] * 2, ranks.text
        text = ranks.text
    assert f"rank 1 on {HOST} is slow" in text
    assert "rank 0 on" not in text
    (line,) = events(run, "straggler")
    assert (line["rank"], line["host"]) == (1, HOST)
    assert line["times"] > 2


def slow_down(rank: int, victim: int, seconds: float) -> None:
    from moe_dist.train import passes

    original = passes.target_loss_sum

    def slow(*args, **options):
        if rank == victim:
            time.sleep(seconds)
        return original(*args, **options)

    passes.target_loss_sum = slow
