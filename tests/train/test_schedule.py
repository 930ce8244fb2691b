"""Schedules: their corners, and that a resumed run computes what an uninterrupted one does."""

from __future__ import annotations

from itertools import pairwise

import pytest

from moe_dist.errors import UserError
from moe_dist.train.schedule import constant, cosine, learning_rate, wsd


def test_cosine_warms_up_to_the_peak_and_falls_to_the_ratio():
    factors = [cosine(step, total=100, warmup=20, min_ratio=0.1) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 21)
    assert factors[20] == 1.0
    assert factors[60] == pytest.approx(0.55)  # halfway between the peak and the ratio
    assert factors[100] == pytest.approx(0.1)
    assert all(a < b for a, b in pairwise(factors[:21]))
    assert all(a > b for a, b in pairwise(factors[20:]))


def test_cosine_stays_at_the_ratio_past_its_end():
    assert cosine(500, total=10, min_ratio=0.25) == pytest.approx(0.25)


def test_constant_warms_up_and_stays():
    assert [constant(step, warmup=3) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert constant(0) == 1.0


def test_wsd_is_flat_and_then_a_straight_line():
    factors = [wsd(step, total=20, warmup=4, decay=5, min_ratio=0.5) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:15] == [1.0] * 11
    assert factors[15:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])
    assert wsd(20, total=20, decay=5, min_ratio=0.5) == 0.5
    assert wsd(99, total=100) == pytest.approx(0.1)
    assert wsd(90, total=100) == 1.0  # a tenth decays where nothing is said


@pytest.mark.parametrize("total", [1, 2])
@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
def test_shortest_runs(name, total):
    for step in range(total):
        assert 0 <= learning_rate(name, step, peak=2.0, total=total, warmup=1) <= 2.0


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(UserError, match="cosine, constant, wsd"):
        learning_rate("linear", 0, peak=1.0, total=2)
