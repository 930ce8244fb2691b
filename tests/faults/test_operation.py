"""Loggers that fail, logs that nobody watches, machines that lack things."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import yaml

from moe_dist.errors import EXIT_OK
from moe_dist.train.metrics import MetricLog
from tests.cli.test_verbs import DRIVER, REPOSITORY, folder, verbs  # noqa: F401 - a fixture among them
from tests.faults.loggers import in_place_of_wandb
from tests.run.processes import write_config
from tests.run.runs import events, make_files, settings
from tests.run.test_bad_input import called

PATIENCE = 240
STEPS = 12
LOG_BYTES, LOG_STEPS = 2_000_000, 10_000


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")


def with_failing_loggers(words: list[str], how: str) -> tuple[int, str, str]:
    """On a rank: a run whose metrics go to a full disk, or whose wandb fails at its start or later."""
    start = MetricLog.__init__

    def on_a_full_disk(log, config, *, active, start_step, file):
        start(log, config, active=active, start_step=start_step, file=Path("/dev/full"))

    wandb = MagicMock()
    if how == "wandb does not start":
        wandb.init.side_effect = ConnectionError("no route to host")
    elif how == "wandb goes away":
        wandb.init.return_value.log.side_effect = ConnectionError("connection reset")
        wandb.init.return_value.finish.side_effect = ConnectionError("connection reset")
    patches = patch.object(MetricLog, "__init__", on_a_full_disk if how == "full disk" else start)
    with patches, in_place_of_wandb(wandb):
        (result,) = called(words)
    return result


@pytest.mark.parametrize("how", ["full disk", "wandb does not start", "wandb goes away"])
def test_fault_41_a_failing_logger_is_one_warning(ranks, files, tmp_path, how):
    run = tmp_path / "run"
    tree = settings(files, run, "qwen3_moe", train={"steps": 3})
    words = ["train", str(write_config(tree, tmp_path / "c.yaml"))]
    words += [] if how == "full disk" else ["logging.wandb=online"]
    ((code, out, err),) = ranks(1, with_failing_loggers, words, how, timeout=PATIENCE)
    assert code == EXIT_OK, err
    assert err.count("warning: ") == 1, err
    assert "step 3/3" in out
    assert (run / "checkpoints" / "step-3").is_dir()
    if how != "full disk":
        assert [line["step"] for line in events(run, "train")] == [1, 2, 3]


def test_fault_41_wandb_without_a_key_is_one_warning(ranks, files, tmp_path):
    run = tmp_path / "run"
    tree = settings(files, run, "qwen3_moe", train={"steps": 2}, logging={"wandb": "online"})
    words = ["train", str(write_config(tree, tmp_path / "c.yaml"))]
    ((code, _, err),) = ranks(1, without_a_key, words, str(tmp_path), timeout=PATIENCE)
    assert code == EXIT_OK, err
    assert err.count("warning: wandb did not start, the run goes on without it") == 1, err
    assert [line["step"] for line in events(run, "train")] == [1, 2]


def without_a_key(words: list[str], home: str) -> tuple[int, str, str]:
    """On a rank: the real wandb, with nobody logged in and nothing that answers."""
    there = {"HOME": home, "NETRC": f"{home}/netrc", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_SILENT": "true"}
    with patch.dict(os.environ, there):
        os.environ.pop("WANDB_API_KEY", None)
        (result,) = called(words)
    return result


def test_fault_42_a_log_that_nobody_watches_is_short(folder):  # noqa: F811
    tree = yaml.safe_load((folder / "c.yaml").read_text())
    tree["train"] |= {"steps": STEPS, "log_every": 4}
    (folder / "long.yaml").write_text(yaml.safe_dump(tree))
    codes, out, err = verbs(
        folder, ["train", "long.yaml", "run.dir=long"], ["eval", "long", "--json", "long.json"], ["export", "long", "e"]
    )
    assert codes == [EXIT_OK] * 3, err
    assert "\r" not in out
    assert "\r" not in err
    assert "\x1b" not in out
    lines = re.findall(r"^step (\d+)/", out, re.MULTILINE)
    assert lines == ["4", "8", "12"]
    longest = max(len(line) for line in out.splitlines() if line.startswith("step "))
    beside = len(out) + len(err)
    assert beside + longest * LOG_STEPS / 10 < LOG_BYTES  # a line every ten steps is the default
    saved = [line for line in out.splitlines() if line.startswith("saved ")]
    assert len(saved) == STEPS // 2


WITHOUT = """
import importlib.metadata, sys
names, real = {names!r}, importlib.metadata.version
def version(name):
    if name in names:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
for name in names:
    sys.modules[name] = None
"""


def without(names: list[str], place: Path, *calls: list[str]) -> tuple[list[int], str, str]:
    """(exit codes, stdout, stderr) of command lines in a process for which these packages are not installed."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=names) + DRIVER, json.dumps(calls)],
        capture_output=True,
        text=True,
        cwd=place,
        timeout=PATIENCE,
        env={
            "PYTHONPATH": str(REPOSITORY),
            "PATH": "/usr/bin:/bin",
            "HF_HUB_OFFLINE": "1",
            "HOME": str(place),
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("code ")]
    return codes, done.stdout, done.stderr


def test_fault_43_without_gpu_and_deepspeed(folder):  # noqa: F811
    codes, out, err = without(
        ["deepspeed"],
        folder,
        ["--help"],
        ["train", "c.yaml", "run.dir=bare", "--dry-run"],
        ["doctor"],
        ["train", "c.yaml", "run.dir=bare"],
        ["inspect", "bare"],
        ["ckpt", "verify", "bare"],
        ["export", "bare", "bare_out"],
    )
    assert codes == [EXIT_OK] * 7, err
    assert "step 4/4" in out
    assert "Traceback" not in err


def test_fault_43_help_needs_no_torch(folder):  # noqa: F811
    codes, _, err = without(["torch", "deepspeed", "transformers"], folder, ["--help"], ["ckpt", "--help"])
    assert codes == [EXIT_OK] * 2, err
