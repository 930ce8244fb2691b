"""The model of the dispatchers' traffic against counting: every choice of experts, weighed by its probability."""

from __future__ import annotations

from itertools import combinations
from math import prod

import numpy as np
import pytest

from moe_dist.moe.draws import MostEntropy, Uniform
from moe_dist.moe.traffic_model import Group, counted_flows, expected_flows, rows_sent, step_bytes

GROUPS = (
    Group.even(4, experts=8, node_size=2),
    Group.even(4, experts=7, node_size=2),
    Group.even(6, experts=9, node_size=3),
    Group.even(4, experts=8, node_size=1),
    Group.even(2, experts=8, node_size=8),
    Group.even(4, experts=3, node_size=2),  # a rank without experts
    Group((3, 0, 2, 1, 1, 0, 3, 2), 4, 2),
)


def choices(group: Group, top_k: int, weights=None) -> list[tuple[tuple[int, ...], float]]:
    """Every set of top_k experts and its probability, in proportion to the product of its weights."""
    sets = list(combinations(range(len(group.rank_of_expert)), top_k))
    weight = [1.0 if weights is None else prod(weights[expert] for expert in ids) for ids in sets]
    return [(ids, w / sum(weight)) for ids, w in zip(sets, weight, strict=True)]


@pytest.mark.parametrize("dispatcher", ["alltoall", "dedup", "node"])
@pytest.mark.parametrize("group", GROUPS, ids=range(len(GROUPS)))
def test_expected_rows_are_the_mean_over_all_choices(dispatcher, group):
    experts = len(group.rank_of_expert)
    for top_k in {1, 2, min(3, experts)}:
        for weights in (None, [1.0 + expert for expert in range(experts)]):
            mean = None
            load_E = np.zeros(experts)
            for ids, probability in choices(group, top_k, weights):
                each_rank = [np.array([ids])] * group.ranks
                flows = [probability * flow for flow in counted_flows(dispatcher, group, each_rank)]
                mean = flows if mean is None else [a + b for a, b in zip(mean, flows, strict=True)]
                load_E[list(ids)] += probability
            got = expected_flows(dispatcher, group, top_k=top_k, load_E=None if weights is None else load_E)
            assert len(got) == (2 if dispatcher == "node" and 1 < group.node_size < group.ranks else 1)
            for model, counted in zip(got, mean, strict=True):
                np.testing.assert_allclose(model, counted, rtol=1e-9, atol=1e-12)


def test_equal_loads_are_the_closed_form():
    sets_GE = np.tril(np.ones((64, 64), dtype=bool))
    even, general = Uniform(64, 8), MostEntropy(np.full(64, 3.0), 8)
    np.testing.assert_allclose(general.hit(sets_GE), even.hit(sets_GE), rtol=1e-12)


def test_loads_are_met_also_by_experts_that_every_token_has():
    loads = np.array([10.0, 9.9, 0.0, 5.0, 3.0, 2.0, 0.1])  # of 10 tokens with 3 each
    draw = MostEntropy(loads, 3)
    np.testing.assert_allclose(draw.hit(np.eye(7, dtype=bool)), loads / 10, atol=1e-10)
    everything = MostEntropy([1, 1, 0, 1], 3)
    assert everything.hit(np.array([[1, 0, 0, 0], [0, 0, 1, 0]], dtype=bool)).tolist() == [1.0, 0.0]


def test_loads_that_cannot_be():
    with pytest.raises(ValueError, match="expert 1 has more than one slot of each token"):
        MostEntropy([1, 6, 1, 1], 2)
    with pytest.raises(ValueError, match="not all zero"):
        MostEntropy([0, 0], 1)
    with pytest.raises(ValueError, match="3 different experts of 2"):
        Uniform(2, 3)
    with pytest.raises(ValueError, match="6 ranks do not fill nodes of 4"):
        Group.even(6, experts=8, node_size=4)


def test_rows_of_a_token_counted_by_hand():
    group = Group.even(4, experts=8, node_size=2)  # two experts a rank, ranks 0 and 1 share a node
    ids = [np.array([[0, 1, 4, 6]]), np.array([[4, 5, -1, 3]]), np.empty((0, 4), dtype=int), np.array([[-1] * 4])]
    plain = rows_sent(counted_flows("alltoall", group, ids), group)
    assert (plain.inside, plain.across) == (
        0,
        4,
    )  # token of rank 0: two at home, one to 2, one to 3; of rank 1: two to 2
    shared = rows_sent(counted_flows("dedup", group, ids), group)
    assert (shared.inside, shared.across) == (0, 3)
    across, inside = counted_flows("node", group, ids)
    # Rank 0's token crosses to rank 2, which uses it and passes it to 3. Rank 1's crosses to 3, which passes it to 2.
    assert across.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert inside.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]]
    crossing = rows_sent([across, inside], group)
    assert (crossing.inside, crossing.across) == (2, 2)


def test_bytes_of_a_step_counted_by_hand():
    group = Group.even(2, experts=4, node_size=1)
    ids = [np.array([[0, 2], [2, 3]]), np.array([[0, 3]])]
    plain = step_bytes("alltoall", counted_flows("alltoall", group, ids), group, hidden=16, top_k=2)
    # 4 slots travel: tokens and gradients there and back at 32 bytes, seat and probability 8, its gradient 4
    assert plain.total == 4 * (4 * 32 + 8 + 4) + 2 * 8 * (1 + 2)
    shared = step_bytes("dedup", counted_flows("dedup", group, ids), group, hidden=16, top_k=2, back_bytes=4, chunks=2)
    assert shared.total == 3 * (2 * 32 + 2 * 64 + 2 * 8 + 2 * 4) + 2 * 2 * 8 * (1 + 2)
    assert (shared.inside, shared.across) == (0, shared.total)


def test_a_thousand_ranks():
    group = Group.even(1024, experts=1024, node_size=8)
    plain, shared, nodes = (
        rows_sent(expected_flows(name, group, top_k=8), group) for name in ("alltoall", "dedup", "node")
    )
    assert plain.across == pytest.approx(1024 * 8 * (1016 / 1024))
    assert shared.across == pytest.approx(plain.across)  # an expert a rank: nothing to share between slots
    assert nodes.across < plain.across
