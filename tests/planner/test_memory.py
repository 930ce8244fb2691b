"""A rank's memory: what the plan says against the measured peak of live tensors in real training steps.

The layouts of all axes are in `benchmarks.plan_memory`; here are those that cost seconds and touch every ZeRO stage.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks._plan_runs import STEPS, config
from benchmarks.plan_memory import CASES, GOAL, most, planned
from moe_dist.config.checks import axes_of
from moe_dist.parallel.grid import layout
from moe_dist.planner.live import LiveBytes
from moe_dist.train.build import plan_model
from moe_dist.train.dry_run import memory_of

CHEAP = {
    name: (world, {**changes, "layers": 2})
    for name, (world, changes) in CASES.items()
    if world == 2 and name != "2 ranks, expert 2, ZeRO 1, bf16"
}


def measured(name: str) -> int:
    world, changes = CHEAP[name]
    # With the optimizer's state there after the first step the second is as all others, but at ZeRO 3.
    return most(changes, world, steps=STEPS if changes.get("zero_stage") == 3 else 2)


@pytest.mark.parametrize("name", CHEAP)
def test_the_planned_peak_is_within_five_percent_of_the_measured_one(ranks, name):
    world, changes = CHEAP[name]
    peak = ranks(world, measured, name, timeout=90)[0]
    assert planned(changes, world) == pytest.approx(peak, rel=GOAL)
    # What the dry run and the preflight say before activations is a part of it.
    settings = config(world, **changes)
    grid = layout(world, **axes_of(settings))
    assert memory_of(settings, plan_model(settings, grid), grid)[0].before_activations_total < peak


def test_live_bytes_follow_storages_until_they_are_freed():
    with LiveBytes("cpu") as live:
        first = torch.zeros(100)
        view = first[10:].view(9, 10)
        assert (live.now, live.peak) == (400, 400)
        second = first + 1
        assert live.now == 800
        del first
        assert live.now == 800, "a view keeps its storage"
        del view, second
        assert (live.now, live.peak) == (0, 800)
        torch.zeros(3, device="meta")
        torch.zeros(5, 7) @ torch.zeros(7, 2)
        assert live.now == 0
        assert live.flops == 2 * 5 * 7 * 2
    with LiveBytes("meta") as live:
        kept = torch.zeros(1 << 40, dtype=torch.bfloat16, device="meta")
        assert live.now == 1 << 41
        del kept
