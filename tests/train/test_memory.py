"""Memory before activations: the rules at each ZeRO stage, and the stage of a pipeline that needs most."""

from __future__ import annotations

import pytest

from moe_dist.parallel.grid import layout
from moe_dist.train.build import plan_model
from moe_dist.train.dry_run import describe, memory_of
from moe_dist.train.memory import Settings, Weight, inventory, settings_of, totals
from tests.train.test_trainable import ARCHITECTURE, config


@pytest.mark.parametrize(
    ("stage", "precision", "weights", "masters", "moments", "gradients", "buffers"),
    [
        (0, "fp32", 4 * 160, 0, 8 * 120, 4 * 120, 0),
        (0, "bf16", 2 * 160, 4 * 120, 8 * 120, 4 * 120, 0),
        (1, "fp32", 4 * 160, 4 * 45, 8 * 45, 4 * 120, 4 * 30),
        (1, "bf16", 2 * 160, 4 * 45, 8 * 45, 6 * 120, 0),
        (2, "fp32", 4 * 160, 4 * 45, 8 * 45, 4 * 45, 4 * 30),
        (2, "bf16", 2 * 160, 4 * 45, 8 * 45, 4 * 45, 4 * 30),
        (3, "fp32", 4 * 60, 4 * 45, 8 * 45, 4 * 45, 4 * 30),
        (3, "bf16", 2 * 60, 4 * 45, 8 * 45, 4 * 45, 4 * 30),
    ],
)
def test_what_is_kept_at_each_zero_stage(stage, precision, weights, masters, moments, gradients, buffers):
    """Dense: 80 elements on 4 ranks, 60 of them train (15 a rank). Experts: 80 on 2 ranks, 60 train (30 a rank)."""
    held = [Weight(60, "dense", True, True), Weight(20, "dense", False, True)]
    held += [Weight(60, "expert", True, True), Weight(20, "expert", False, True)]
    kept = settings_of(totals(held), layout(4, expert=2), zero_stage=stage, precision=precision, bucket=30)
    assert kept.before_activations == {
        "weights": weights,
        "masters": masters,
        "moments": moments,
        "gradients": gradients,
        "buffers": buffers,
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tensor", [1, 2])
def test_of_a_pipeline_the_stage_that_needs_most_is_shown(tied, tensor):
    axes = {"pipeline": 2, "tensor": tensor, "expert": 2}
    architecture = ARCHITECTURE | {"tie_word_embeddings": tied, "vocab_size": 5000}
    made = config(parallel=axes | {"zero_stage": 1}, model={"config": architecture}, train={"precision": "bf16"})
    found: list[Settings] = []
    for rank in (0, 2 * tensor):
        grid = layout(4 * tensor, rank, **axes)
        held = totals(weight for part in inventory(plan_model(made, grid).local).values() for weight in part)
        bucket = made.parallel.reduce_bucket_size
        found.append(settings_of(held, grid, zero_stage=1, precision="bf16", bucket=bucket))
        kept, stage = memory_of(made, plan_model(made, grid), grid)
    assert kept.before_activations == found[stage].before_activations
    assert kept.before_activations_total == max(one.before_activations_total for one in found)
    assert f"a rank of stage {stage} before activations: weights" in describe(made, 4 * tensor)
