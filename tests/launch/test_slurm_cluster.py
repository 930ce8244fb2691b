"""The rendered script under a real SLURM of two nodes: train over both, be preempted, requeued, resumed, and finish."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.launch.slurm_cluster import Cluster, why_not

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "configs/debug/tiny.yaml"
STEPS = 120

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        running.environ["PYTHONPATH"] = str(REPOSITORY)
        yield running


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The debug configuration, smaller, as a file of its own."""
    tree = yaml.safe_load(TINY.read_text())
    tree["data"]["cache_dir"] = str(tmp_path_factory.mktemp("cache"))
    tree["data"]["eval"] = {}
    tree["data"]["seq_len"] = 32
    tree["train"] |= {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2}
    tree["parallel"] = {"expert": 2}
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def submit(cluster, *words):
    options = ["--nodes=2", "--gpus-per-node=0", "--ranks-per-node=1", "--requeue", "--time=10", "--submit"]
    done = subprocess.run(
        [sys.executable, "-m", "moe_dist", "launch", "slurm", *map(str, words), *options],
        cwd=REPOSITORY, env=cluster.environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/usr/bin/env bash\n#SBATCH ")
    return re.search(r"Submitted batch job (\d+)", done.stderr)[1]


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["event"] == "train"}


def log_of(run, number):
    path = run / "launch" / f"slurm-{number}.log"
    return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def whole(cluster, config, tmp_path_factory):
    """A run that nothing disturbs, by the deepspeed launcher."""
    run = tmp_path_factory.mktemp("whole") / "run"
    number = submit(cluster, config, f"run.dir={run}", "--launcher=deepspeed")
    ended = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", timeout=100)
    assert ended["JobState"] == "COMPLETED", log_of(run, number)
    return run


@pytest.mark.timeout(240)
def test_preempted_requeued_resumed_and_finished_with_the_same_losses(cluster, config, whole, tmp_path):
    run = tmp_path / "run"
    number = submit(cluster, config, f"run.dir={run}", "--launcher=torchrun")
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or '"train"' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < end, log_of(run, number)
        time.sleep(0.02)
    # What `#SBATCH --signal=B:USR1@300` sends: to the shell of the batch script alone.
    cluster.say("scancel", "--signal=USR1", "--batch", number)
    cluster.wait(number, "PENDING", timeout=60)
    stopped_at = max(losses(run))
    assert 1 <= stopped_at < STEPS
    assert (run / "checkpoints/latest").read_text().strip() == f"step-{stopped_at}"
    cluster.say("scontrol", "update", f"JobId={number}", "StartTime=now")  # SLURM lets a requeued job wait
    ended = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", timeout=100)
    assert ended["JobState"] == "COMPLETED", log_of(run, number)
    assert ended["Restarts"] == "1"
    assert f"stopped on request at step {stopped_at}" in log_of(run, number)
    assert losses(run) == losses(whole)


@pytest.mark.timeout(240)
def test_a_node_that_dies_is_waited_for_and_the_run_goes_on_with_the_same_losses(cluster, config, whole, tmp_path):
    run = tmp_path / "run"
    number = submit(cluster, config, f"run.dir={run}", "--launcher=torchrun")
    end = time.monotonic() + 60
    while not (run / "checkpoints/latest").exists():
        assert time.monotonic() < end, log_of(run, number)
        time.sleep(0.02)
    cluster.kill_node("n2")
    reached = max(losses(run))
    assert reached < STEPS
    time.sleep(1)
    cluster.start_node("n2")
    end = time.monotonic() + 150
    while (job := cluster.job(number))["JobState"] != "COMPLETED" or job["Restarts"] == "0":
        assert time.monotonic() < end, (job, log_of(run, number))
        assert job["JobState"] not in ("FAILED", "CANCELLED"), log_of(run, number)
        if job["JobState"] == "PENDING":
            cluster.say("scontrol", "update", f"JobId={number}", "StartTime=now")
        time.sleep(0.5)
    assert "resuming small from" in log_of(run, number)
    assert losses(run) == losses(whole)


@pytest.mark.timeout(120)
def test_a_wrong_config_is_not_requeued(cluster, config, tmp_path):
    run, own = tmp_path / "run", tmp_path / "wrong.yaml"
    own.write_text(config.read_text())
    number = submit(cluster, own, f"run.dir={run}")
    own.write_text(own.read_text() + "nonsense: 1\n")  # spoilt while the job was on its way
    ended = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", "PENDING", timeout=60)
    while ended["JobState"] == "PENDING" and ended["Restarts"] == "0":
        ended = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", timeout=60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), log_of(run, number)
    assert "unknown key nonsense" in log_of(run, number)
