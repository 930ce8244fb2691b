"""A rank's memory: what the plan says against the measured peak of live tensors in real training steps.

The layouts of all axes are in `benchmarks.plan_memory`; here are those that cost seconds and touch every ZeRO stage.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.plan_memory import CASES, GOAL, most, planned
from moe_dist.planner.live import LiveBytes

CHEAP = [name for name, (world, _) in CASES.items() if world == 2]


def measured(name: str) -> int:
    world, changes = CASES[name]
    return most(changes, world)


@pytest.mark.parametrize("name", CHEAP)
def test_the_planned_peak_is_within_five_percent_of_the_measured_one(ranks, name):
    world, changes = CASES[name]
    peak = ranks(world, measured, name, timeout=90)[0]
    assert planned(changes, world) == pytest.approx(peak, rel=GOAL)


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
