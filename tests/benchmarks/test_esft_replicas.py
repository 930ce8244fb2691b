"""Copies of frozen experts: the goal on real routing, and that what is counted by table is what travels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import esft_replicas
from benchmarks._wire_runs import EXPERTS, HIDDEN, WIDTH, Way, layout, step
from benchmarks._workloads import workload
from benchmarks.wire import rows_of
from moe_dist.config.expert_files import read_expert_config
from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import build_grid
from tests.methods.esft import published

TRAINABLE = [3, 40]


def rows_that_left() -> tuple[int, float, float]:
    """On each rank: rows that it sent to others, there, and what the benchmark counts of all ranks."""
    grid = build_grid(expert=4)
    ids = workload("W1 hot expert", layout(4, tokens=48))
    load_E = torch.cat(ids).flatten().bincount(minlength=EXPERTS).numpy()
    placement = esft_replicas.placed(load_E, TRAINABLE, 4, spare=1)
    layer = MoEExperts(ExpertSpec(EXPERTS, HIDDEN, WIDTH), placement, grid)
    there = rows_of(step(layer, Way("dedup"), ids[grid.expert_rank]))[0]
    return int(there.sum() - there[grid.expert_rank]), *esft_replicas.counted(placement, torch.cat(ids).numpy())


def test_the_rows_counted_are_those_that_travel(ranks):
    results = ranks(4, rows_that_left)
    assert sum(rows for rows, _, _ in results) == round(results[0][2] * 4 * 48)
    assert results[0][1] < 1.02


def test_what_a_copy_is_worth_is_counted():
    """One token a rank of two, each with both experts: a copy on every rank leaves nothing to send."""
    ids_TK = np.array([[0, 1], [1, 0]])
    assert esft_replicas.counted(esft_replicas.from_lists([[0], [1]], num_experts=2, trainable=[]), ids_TK) == (
        1.0,
        1.0,
    )
    both = esft_replicas.from_lists([[0, 1], [0, 1]], num_experts=2, trainable=[])
    assert esft_replicas.counted(both, ids_TK) == (1.0, 0.0)


@published.needed
def test_the_goal_on_real_routing():
    """One spare seat a rank and layer, 16 ranks: within 1 % of the bound that the hottest trainable expert sets."""
    ids_LTK, _, _ = published.routing()
    trainable = list(read_expert_config(published.FOLDER / "intent_expert_config.json").experts.values())
    loads = [np.bincount(ids_TK.ravel(), minlength=64).astype(float) for ids_TK in ids_LTK]
    bounds = [esft_replicas.least(load_E, train, 16) for load_E, train in zip(loads, trainable, strict=True)]
    assert np.mean(bounds) == pytest.approx(1.0208, abs=1e-4)
    halves = [(ids_LTK, ids_LTK)]
    load, rows = esft_replicas.figures(halves, trainable, 16, 1)
    plain, plain_rows = esft_replicas.figures(halves, trainable, 16, 0)
    assert load < 1.01 * np.mean(bounds) < 1.04 < plain
    assert rows < 0.98 * plain_rows
