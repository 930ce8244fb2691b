"""The debug config on a GPU: the same command trains there, and its losses are those of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist import checkpoint

REPOSITORY = Path(__file__).parents[2]
STEPS = 20
# The first loss is a mean over a thousand labels of sums in fp32, whose roundings (6e-8 each) average out. After that
# AdamW carries on what rounding began, and a token whose second and third expert are all but tied may go to another
# expert, which moves the mean by about a thousandth of that token's loss. On the CPU, other kernels and other numbers
# of threads give losses up to 1.4e-6 apart over these steps; a GPU rounds in more places.
FIRST, LATER = 2e-6, 1e-4


def losses(run: Path, cache: Path, **environment: str) -> list[float]:
    """Losses of the steps of a debug run, and the held-out one at the end."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.debug_run", str(run), str(cache)],
        cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line["loss"] for line in lines if line["event"] == "train"]
    assert len(trained) == STEPS
    return [*trained, *(line["domains"]["code"]["loss"] for line in lines if line["event"] == "eval")]


@pytest.mark.timeout(600)
def test_twenty_steps_have_the_losses_of_the_cpu(tmp_path):
    on_cpu = losses(tmp_path / "cpu", tmp_path / "cache", MOE_DIST_DEVICE="cpu")
    on_cuda = losses(tmp_path / "cuda", tmp_path / "cache", MOE_DIST_DEVICE="")
    assert on_cuda[0] == pytest.approx(on_cpu[0], rel=FIRST)
    assert on_cuda == pytest.approx(on_cpu, rel=LATER)
    assert on_cuda[-1] < on_cuda[0] - 0.3
    with checkpoint.open_checkpoint(tmp_path / "cuda" / "checkpoints" / f"step-{STEPS}", verify="full") as opened:
        assert opened.trainer_state["adam_step"] == STEPS
