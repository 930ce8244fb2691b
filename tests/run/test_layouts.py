"""A checkpoint goes from layout to layout: weights, moments and buffers keep every bit, on any axes and ZeRO stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_dist import checkpoint
from tests.run.runs import assert_same_bits, carry_over, make_files, settings, stored, train

STEPS = 2
# (ranks, parallel): every axis is met at one and at two ranks of it, alone and with others, and every ZeRO stage.
WAY = [
    (2, {"tensor": 2, "zero_stage": 0}),
    (4, {"pipeline": 2, "tensor": 2, "expert": 2, "zero_stage": 3}),
    (2, {"pipeline": 2, "zero_stage": 2}),
    (4, {"sequence": 2, "tensor": 2, "expert": 4, "zero_stage": 1}),
    (4, {"tensor": 2, "expert": 1, "zero_stage": 3}),
    (1, {"zero_stage": 1}),
    (4, {"pipeline": 2, "expert": 2, "zero_stage": 0}),
    (2, {"sequence": 2, "expert": 2, "zero_stage": 2}),
    (4, {"pipeline": 2, "tensor": 2, "zero_stage": 1}),
]

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(
    ("family", "precision", "trainable", "changes"),
    [
        ("mixtral", "fp32", {}, {"num_local_experts": 6}),
        ("qwen3_moe", "bf16", {}, {"tie_word_embeddings": True}),
        ("deepseek_v3", "fp32", {"experts": {"1": [0, 5], "2": [3]}, "exclude": ["*.o_proj.*"]}, {}),
    ],
)
def test_every_layout_continues_every_other(ranks, tmp_path, family, precision, trainable, changes):
    files = make_files(tmp_path, family, num_hidden_layers=3, **changes)

    def tree(parallel: dict) -> dict:
        return settings(
            files,
            tmp_path / "run",
            family,
            trainable=trainable,
            train={"steps": STEPS, "precision": precision},
            parallel=parallel,
        )

    assert ranks(1, train, tree({}), timeout=300) == [0]
    first = stored(tmp_path / "run", STEPS)
    assert any(tensor.any() for (kind, *_), tensor in first.items() if kind == "exp_avg")
    here = tmp_path / "run" / "checkpoints" / f"step-{STEPS}"
    for number, (world, parallel) in enumerate(WAY):
        out = tmp_path / str(number)
        ranks(world, carry_over, tree(parallel), here, out / "checkpoints", timeout=120)
        assert_same_bits(stored(out, STEPS), first)
        assert checkpoint.verify(out / "checkpoints" / f"step-{STEPS}").ok
        here = out / "checkpoints" / f"step-{STEPS}"


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2, "zero_stage": 3}, {"sequence": 2}])
def test_a_run_that_was_stopped_is_the_uninterrupted_one(ranks, tmp_path, parallel):
    """In the same layout: to the bit, also where two stages hold copies of one tensor."""
    files = make_files(tmp_path, "qwen3_moe", tie_word_embeddings=True)

    def run(name: str, **changes) -> Path:
        tree = settings(
            files,
            tmp_path / name,
            "qwen3_moe",
            parallel=parallel,
            train={"steps": 4, **changes},
            checkpoint={"every": 1, "background": True},
        )
        assert set(ranks(2, train, tree, timeout=300)) == {0}
        return tmp_path / name

    whole = run("whole")
    run("parted", stop_at=2)
    assert_same_bits(stored(run("parted"), 4), stored(whole, 4))
    assert all(torch.isfinite(tensor).all() for tensor in stored(whole, 4).values())
