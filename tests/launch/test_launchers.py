"""The launchers themselves, not what they set: torchrun and deepspeed on two "nodes" of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist import checkpoint
from moe_dist.errors import EXIT_OK, EXIT_PREEMPTED
from tests.pool import free_port
from tests.run.processes import end, environment, trained_steps, wait_for_step, write_config
from tests.run.runs import assert_same_bits, events, make_files, settings, stored, train

STEPS = 30
PATIENCE = 240

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")


def run_settings(files, run) -> dict:
    parallel = {"expert": 2, "zero_stage": 1, "world_size": 2}
    return settings(
        files,
        run,
        "qwen3_moe",
        parallel=parallel,
        train={"steps": STEPS, "precision": "bf16"},
        checkpoint={"every": 12},
    )


@pytest.fixture(scope="module")
def uninterrupted(ranks, files) -> Path:
    run = files / "uninterrupted"
    assert ranks(2, train, run_settings(files, run), timeout=PATIENCE) == [EXIT_OK] * 2
    return run


def nodes(launcher: str, words: tuple[str, ...], folder: Path) -> list[subprocess.Popen]:
    """One launcher for each of two nodes, as a batch script starts them."""
    port = free_port()
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    started = []
    for node in range(2):
        command = [sys.executable, "-m"]
        if launcher == "torchrun":
            command += ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}"]
            command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two", "-m"]
        else:
            command += ["deepspeed.launcher.runner", "--hostfile", str(folder / "hosts"), "--no_ssh", "--no_ssh_check"]
            command += ["--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port), "--module"]
        with open(folder / f"output-{node}", "ab") as output:
            env = environment(MOE_DIST_EXIT_FILE=str(folder / "exit"), HOSTNAME=os.environ.get("HOSTNAME", ""))
            process = subprocess.Popen(
                [*command, "moe_dist", *words], cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT
            )
        started.append(process)
    return started


def output(folder: Path) -> str:
    return "\n".join((folder / f"output-{node}").read_text() for node in range(2))


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_nodes_stop_by_the_file_and_go_on(files, uninterrupted, tmp_path, launcher):
    run = tmp_path / "run"
    words = ("train", str(write_config(run_settings(files, run), tmp_path / "c.yaml")))
    launchers = nodes(launcher, words, tmp_path)
    try:
        wait_for_step(run, 3, launchers, seconds=PATIENCE)
        (run / "launch").mkdir(exist_ok=True)
        (run / "launch/stop").touch()
        for process in launchers:
            process.wait(PATIENCE)
    finally:
        end(launchers)
    assert (tmp_path / "exit").read_text() == str(EXIT_PREEMPTED), output(tmp_path)
    stopped = trained_steps(run)[-1]
    assert 3 <= stopped < STEPS
    assert checkpoint.find_latest(run / "checkpoints").path.name == f"step-{stopped}"

    (tmp_path / "exit").unlink()
    launchers = nodes(launcher, words, tmp_path)
    try:
        codes = [process.wait(PATIENCE) for process in launchers]
    finally:
        end(launchers)
    assert codes == [EXIT_OK] * 2, output(tmp_path)
    assert (tmp_path / "exit").read_text() == "0"
    assert trained_steps(run) == list(range(1, STEPS + 1))
    assert events(run, "train") == events(uninterrupted, "train")
    assert_same_bits(stored(run, STEPS), stored(uninterrupted, STEPS))


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_node_that_is_missing_is_named(files, tmp_path, launcher):
    """A launcher that was told of one machine, where the run is meant for two."""
    words = ("train", str(write_config(run_settings(files, tmp_path / "run"), tmp_path / "c.yaml")))
    start = {
        "deepspeed": ["deepspeed.launcher.runner", "--hostfile", str(tmp_path / "mistyped"), "--num_gpus", "1"],
        "torchrun": ["torch.distributed.run", "--nnodes=1", "--nproc-per-node=1"],
    }[launcher]
    start += ["--master_port", str(free_port()), "--module", "moe_dist", *words]
    env = environment(MOE_DIST_EXIT_FILE=str(tmp_path / "exit"))
    done = subprocess.run(
        [sys.executable, "-m", *start], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode != EXIT_OK
    assert (tmp_path / "exit").read_text() == "2"
    assert "parallel.world_size=2, but the launcher started 1 rank(s)" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
