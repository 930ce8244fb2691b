"""Signals, stop files, launchers, ports and hosts: what a cluster does to a run that is well."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from moe_dist import checkpoint
from moe_dist.errors import EXIT_OK, EXIT_PREEMPTED, EXIT_TRANSIENT
from tests.faults.harm import at_place
from tests.faults.test_failing import slow_down
from tests.run.forked import Ranks
from tests.run.processes import trained_steps, write_config
from tests.run.runs import assert_same_bits, events, make_files, settings, stored

WITHIN = 90
REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")


def run_settings(files, run, **sections) -> dict:
    return settings(
        files,
        run,
        "qwen3_moe",
        data={"eval": {"held": {"path": str(files / "text.jsonl"), "limit": 6}}},
        parallel={"expert": 2, "zero_stage": 1, **sections.pop("parallel", {})},
        train={"steps": 6, "eval_every": 4, **sections.pop("train", {})},
        checkpoint={"every": 3},
        **sections,
    )


def words_for(files, folder: Path, **sections) -> tuple[str, str]:
    return "train", str(write_config(run_settings(files, folder / "run", **sections), folder / "c.yaml"))


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with Ranks(2, words_for(files, folder), folder / "output") as ranks:
        assert ranks.wait(WITHIN) == [EXIT_OK] * 2, ranks.text
    return folder / "run"


def send(rank: int, victim: int, place: str, number: int, call: int) -> None:
    """Have the victim get a signal there."""
    if rank == victim:
        at_place(rank, place, lambda: os.kill(os.getpid(), number), call)


def goes_on(words, folder: Path, undisturbed: Path) -> None:
    """The same command again finishes the run as if nothing had happened."""
    with Ranks(2, words, folder / "again") as ranks:
        assert ranks.wait(WITHIN) == [EXIT_OK] * 2, ranks.text
    run = folder / "run"
    assert trained_steps(run) == trained_steps(undisturbed)
    assert events(run, "train", "eval") == events(undisturbed, "train", "eval")
    assert_same_bits(stored(run, 6), stored(undisturbed, 6))


# Where, the how manieth time there (two micro-batches a step), and the step at which all save.
PLACES = {
    "loading": ("loading", 1, 0),
    "forward": ("forward", 3, 2),
    "checkpoint": ("checkpoint", 1, 3),
    "evaluation": ("evaluation", 1, 4),
    "last step": ("forward", 12, 6),
}
CASES = [(number, "forward") for number in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")]
CASES += [("SIGTERM", place) for place in PLACES if place != "forward"]


@pytest.mark.parametrize(
    ("number", "place"),
    [
        pytest.param(*case, marks=() if case == ("SIGUSR2", "forward") else pytest.mark.report_only, id="-".join(case))
        for case in CASES
    ],
)
def test_fault_14_a_signal_to_one_rank(files, undisturbed, tmp_path, number, place):
    where, call, step = PLACES[place]
    words = words_for(files, tmp_path)
    victim = 1 if number == "SIGTERM" else 0
    with Ranks(2, words, tmp_path / "output", before=send, args=(victim, where, signal.Signals[number], call)) as ranks:
        assert ranks.wait(WITHIN) == [EXIT_PREEMPTED] * 2, ranks.text
    run = tmp_path / "run"
    if step:
        newest = checkpoint.find_latest(run / "checkpoints")
        assert newest.path == run / "checkpoints" / f"step-{step}"
        assert newest.notes == ()
        assert max(trained_steps(run)) == step
    else:
        assert not (run / "checkpoints").exists()
    goes_on(words, tmp_path, undisturbed)


@pytest.mark.report_only
def test_fault_14_a_second_signal_stops_at_once(files, undisturbed, tmp_path):
    words = words_for(files, tmp_path)
    with Ranks(2, words, tmp_path / "output", before=send_twice) as ranks:
        codes = ranks.wait(WITHIN)
        text = ranks.text
    assert codes[1] == 130, (codes, text)
    assert codes[0] not in (None, EXIT_OK, EXIT_PREEMPTED), (codes, text)
    newest = checkpoint.find_latest(tmp_path / "run/checkpoints")
    assert newest.path.name == "step-3"
    assert newest.notes == ()
    goes_on(words, tmp_path, undisturbed)


def send_twice(rank: int) -> None:
    """SIGTERM in the fifth step, and again three seconds later, in the same step."""

    def insist() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    if rank == 1:
        at_place(rank, "forward", insist, 9)


def test_fault_15_the_stop_file_of_plain_ranks(files, undisturbed, tmp_path):
    words = words_for(files, tmp_path)
    run = tmp_path / "run"
    with Ranks(2, words, tmp_path / "output", before=touch_the_stop_file, args=(str(run),)) as ranks:
        assert ranks.wait(WITHIN) == [EXIT_PREEMPTED] * 2, ranks.text
    assert checkpoint.find_latest(run / "checkpoints").path.name == "step-2"
    assert not (run / "launch/stop").exists()
    goes_on(words, tmp_path, undisturbed)


def touch_the_stop_file(rank: int, run: str) -> None:
    def touch() -> None:
        Path(run, "launch").mkdir(exist_ok=True)
        Path(run, "launch/stop").touch()

    if rank == 1:
        at_place(rank, "forward", touch, 3)


def test_fault_16_a_lead_shorter_than_a_save(files, tmp_path):
    _, config = words_for(files, tmp_path)
    with Ranks(2, ("preflight", config), tmp_path / "output", MOE_DIST_SIGNAL_LEAD=1e-6) as ranks:
        assert ranks.wait(WITHIN) == [EXIT_OK] * 2, ranks.text
        text = ranks.text
    assert text.count("warning: preflight: the signal to stop comes 0 s before the end, and a save takes about") == 1
    with Ranks(2, ("preflight", config), tmp_path / "enough", MOE_DIST_SIGNAL_LEAD=300) as ranks:
        assert ranks.wait(WITHIN) == [EXIT_OK] * 2, ranks.text
        assert "warning: preflight" not in ranks.text


@pytest.mark.parametrize(
    ("hostfile", "message"),
    [
        ("a slots=2\nb slots=2\na slots=1\n", ":3: a is there already, in line 1"),
        ("a slots=2\nb slots=0\n", ":2: b has no slots"),
        ("a slots=2\nb slot=2\n", ":2: not of the form HOST slots=N"),
        ("# nothing\n\n", ": names no host"),
        (None, "no such hostfile"),
    ],
)
def test_fault_19_a_wrong_hostfile(tmp_path, hostfile, message):
    file = tmp_path / "hosts"
    if hostfile is not None:
        file.write_text(hostfile)
    done = subprocess.run(
        [REPOSITORY / "launch/deepspeed_multinode.sh", file, "c.yaml"],
        env={"PATH": os.environ["PATH"], "PYTHON": "/bin/false"}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2, done
    assert message in done.stderr


def test_fault_20_a_port_that_is_taken(files, tmp_path):
    words = words_for(files, tmp_path, launch={"join_timeout": 5.0})
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with Ranks(2, words, tmp_path / "output", MASTER_PORT=port) as ranks:
            assert ranks.wait(WITHIN) == [EXIT_TRANSIENT] * 2, ranks.text
            text = ranks.text
    assert f"cannot listen on port {port}" in text
    assert "choose another one" in text
    assert not (tmp_path / "run").exists()


def test_fault_20_a_rank_at_the_port_of_another_job(files, undisturbed, tmp_path):
    """The other job goes on; the stranger says that its own rank 0 did not come."""
    words = words_for(files, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    strange = words_for(files, other, launch={"join_timeout": 2.0})
    with Ranks(2, words, tmp_path / "output", before=slow_down, args=(1, 1.0)) as ranks:
        where = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": ranks.port}
        with Ranks(1, strange, other / "output", **where) as stranger:
            assert stranger.wait(WITHIN) == [EXIT_TRANSIENT], stranger.text
            assert "rank 0 has not come within 2 s" in stranger.text
        assert ranks.wait(WITHIN) == [EXIT_OK] * 2, ranks.text
    assert events(tmp_path / "run", "train") == events(undisturbed, "train")


def test_fault_20_a_rank_that_never_comes_is_named(files, tmp_path):
    alone = {"parallel": {"expert": 1}, "train": {"global_batch_size": 6}}
    words = words_for(files, tmp_path, launch={"join_timeout": 3.0}, **alone)
    with Ranks(1, words, tmp_path / "output", WORLD_SIZE=3) as ranks:
        assert ranks.wait(WITHIN) == [EXIT_TRANSIENT], ranks.text
        assert "2 of 3 ranks have not come within 3 s: ranks 1, 2" in ranks.text


def test_fault_23_a_replica_that_drifts(files, tmp_path):
    """One bit of one rank's router, in the third step: found by the next check."""
    words = words_for(files, tmp_path, launch={"check_replicas": 2}, parallel={"zero_stage": 0})
    with Ranks(2, words, tmp_path / "output", before=drift) as ranks:
        codes, text = ranks.wait(WITHIN), ranks.text
    assert codes == [87, 87], text
    host = socket.gethostname()
    assert "at step 4 ranks differ that have to be the same" in text
    assert f"model.layers.1.mlp.gate.weight: rank 1 on {host} against rank 0" in text
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines if line["event"] == "train") == 3


def drift(rank: int) -> None:
    import torch

    from moe_dist.train import loop

    original = loop.build_model

    def build_model(*args):
        model = original(*args)
        if rank == 1:

            def flip() -> None:
                model.get_parameter("model.layers.1.mlp.gate.weight").data.view(-1).view(torch.int32)[5] ^= 1 << 12

            at_place(rank, "forward", flip, 5)
        return model

    loop.build_model = build_model


@pytest.mark.parametrize("what", ["package", "versions", "config"])
def test_fault_24_a_rank_unlike_the_others(ranks, files, tmp_path, what):
    from tests.launch.test_preflight import attempt

    tree = run_settings(files, tmp_path / "run")
    for name, message, _ in ranks(2, attempt, tree, what):
        assert name == "UserError"
        assert f"rank 1 on {socket.gethostname()}" in message
    assert not (tmp_path / "run").exists()
