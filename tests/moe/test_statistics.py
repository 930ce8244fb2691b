"""Load figures from counts: of experts, and of the ranks that hold them."""

from __future__ import annotations

import pytest
import torch

from moe_dist.moe.statistics import LoadStatistics, rank_load_max, summarise


def test_figures_of_a_layer():
    figures = summarise(torch.tensor([6, 0, 3, 3, 4]))
    assert figures == pytest.approx({"load_max": 2.0, "load_entropy": 0.75, "dead": 1.0, "dropped": 0.25})
    assert summarise(torch.tensor([0, 0, 0]))["load_max"] == 0.0


def test_the_busiest_rank():
    total = torch.tensor([6, 0, 3, 3, 100])  # the last one is what was dropped
    assert rank_load_max(total, [{0: 1, 1: 1}, {2: 1, 3: 1}]) == 1.0
    assert rank_load_max(total, [{0: 1, 2: 1}, {1: 1, 3: 1}]) == 1.5
    assert rank_load_max(total, [{0: 1}, {1: 1}, {2: 1, 3: 1}]) == 1.5
    assert rank_load_max(torch.zeros(5, dtype=torch.int64), [{0: 1, 1: 1}, {2: 1, 3: 1}]) == 0.0


def test_counts_add_up_until_reset():
    statistics = LoadStatistics(3)
    statistics.add(torch.tensor([1, 0, 2]), 0)
    statistics.add(torch.tensor([0, 4, 1]), torch.tensor(2))
    assert statistics.total(None).tolist() == [1, 4, 3, 2]
    statistics.reset()
    assert statistics.total(None).tolist() == [0, 0, 0, 0]
