"""Splitting loads over copies, against a linear program."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.optimize import linprog

from moe_dist.moe.splitting import split_load


def least_level(loads: list[float], ranks: list[list[int]]) -> float:
    """min t with x >= 0, sum_r x[e, r] = load[e] and sum_e x[e, r] <= t, by scipy."""
    pairs = [(expert, rank) for rank, held in enumerate(ranks) for expert in held]
    whole, bound = np.zeros((len(loads), len(pairs) + 1)), np.zeros((len(ranks), len(pairs) + 1))
    for column, (expert, rank) in enumerate(pairs):
        whole[expert, column] = bound[rank, column] = 1
    bound[:, -1] = -1
    costs = [0.0] * len(pairs) + [1.0]
    return linprog(costs, A_ub=bound, b_ub=np.zeros(len(ranks)), A_eq=whole, b_eq=loads).fun


def test_the_largest_load_is_the_least_possible():
    chance = random.Random(0)
    for _ in range(150):
        experts, ranks = chance.randint(1, 9), chance.randint(1, 5)
        loads = [chance.choice([0.0, 1.0, 9 * chance.random()]) for _ in range(experts)]
        held = [{e for e in range(experts) if chance.random() < 0.35} for _ in range(ranks)]
        for expert in range(experts):
            held[chance.randrange(ranks)].add(expert)
        lists = [sorted(ids) for ids in held]
        split = split_load(loads, lists)
        assert split.level == pytest.approx(least_level(loads, lists), rel=1e-6, abs=1e-9)
        total_P = [sum(loads[e] for e in ids if e not in split.parts) for ids in lists]
        for expert, parts in split.parts.items():
            assert set(parts) == {rank for rank, ids in enumerate(lists) if expert in ids}
            assert sum(parts.values()) == pytest.approx(loads[expert])
            assert min(parts.values()) >= -1e-12
            assert sum(split.fractions(expert).values()) == pytest.approx(1.0)
            for rank, part in parts.items():
                total_P[rank] += part
        assert max(total_P) <= split.level * (1 + 1e-6) + 1e-12


def test_a_copy_serves_its_own_rank_where_the_level_allows():
    split = split_load([8.0, 4.0, 4.0], [[0, 1], [0, 2]])
    assert (split.level, split.parts) == (8.0, {0: {0: 4.0, 1: 4.0}})
    split = split_load([3.0, 3.0, 3.0, 3.0], [[0, 1], [0, 2], [0, 3]])
    assert split.parts[0] == pytest.approx({0: 1.0, 1: 1.0, 2: 1.0})
