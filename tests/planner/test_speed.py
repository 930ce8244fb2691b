"""The limits of estimated time: what bounds products, what exchanges of nothing cost, and what is searched."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.config.load import load
from moe_dist.planner.anatomy import Layout
from moe_dist.planner.hardware import GPUS, Cluster
from moe_dist.planner.search import MICRO_BATCHES, UNSEATED, layouts
from moe_dist.planner.speed import HOP_EXCHANGES, Clock, Part, part_seconds
from moe_dist.planner.study import Study

TINY = Path(__file__).parents[2] / "configs" / "debug" / "tiny.yaml"
FREE = {"begin": 0.0, "message_inside": 0.0, "message_across": 0.0, "launch": 0.0}
H100 = GPUS["h100"]


@pytest.fixture(scope="module")
def study() -> Study:
    return Study(load(TINY))


def part(*, rows: int, expert_rows: int = 0, elements: int = 10**8, kernels: int = 0) -> Part:
    """Forward and backward of weights of so many bf16 elements, others' and experts'."""
    expert_elements = elements if expert_rows else 0
    return Part(6 * rows * elements, 6 * elements, 6 * expert_rows * expert_elements, 6 * expert_elements, kernels)


def test_many_rows_are_bound_by_operations_and_one_row_by_reading_its_weights():
    cluster = Cluster(H100, 8, **FREE)
    rate = H100.bf16 * cluster.achieved
    read = 6 * 10**8 / H100.memory_rate
    assert part_seconds(part(rows=8192), cluster, bf16=True) == pytest.approx(6 * 8192 * 10**8 / rate)
    assert part_seconds(part(rows=1), cluster, bf16=True) == pytest.approx(read)
    # Experts that few rows reach are read whole, however many rows other weights have.
    both = part_seconds(part(rows=8192, expert_rows=2), cluster, bf16=True)
    assert both == pytest.approx(6 * 8192 * 10**8 / rate + read)
    # Both bounds are alike at rate / memory_rate rows for the two bytes and two operations of an element.
    even = rate / H100.memory_rate
    assert part_seconds(part(rows=round(even)), cluster, bf16=True) == pytest.approx(read, rel=0.01)


def test_the_host_bounds_parts_whose_kernels_are_short():
    cluster = replace(Cluster(H100, 8), launch=5e-6)
    assert part_seconds(part(rows=1, elements=10, kernels=100), cluster, bf16=True) == pytest.approx(5e-4)
    large = part_seconds(part(rows=8192, kernels=100), cluster, bf16=True)
    assert large == part_seconds(part(rows=8192), cluster, bf16=True), "hidden behind longer kernels"


def test_latency_is_of_the_links_that_a_group_crosses():
    cluster = Cluster(H100, 64, begin=100.0, message_inside=1.0, message_across=10.0)
    assert cluster.latency(1) == 0
    assert cluster.latency(8) == 100 + 7
    assert cluster.latency(16) == 100 + 14 + 10, "two nodes of eight: one message of a ring goes across"
    assert cluster.latency(4, 8) == 100 + 3 * 10, "each on its own node"
    assert cluster.latency(4, 4) == 100 + 2 + 10


@pytest.mark.parametrize(
    ("sizes", "exchanges"),
    [
        ({"world": 1}, 0),
        # There and back in each forward and backward, at least: queries, keys and values may go at once or apart.
        ({"world": 2, "sequence": 2}, None),
        ({"world": 2, "tensor": 2}, None),
        ({"world": 2, "expert": 2}, 2 * HOP_EXCHANGES),  # two experts layers
        ({"world": 2, "pipeline": 2}, 1),  # to the neighbour
    ],
)
def test_latency_is_counted_once_an_exchange(study, sizes, exchanges):
    plan = Layout(**sizes, micro_batches=4)
    cluster = Cluster(H100, plan.world, **{**FREE, "begin": 1.0})
    clock = Clock(study, cluster)
    if exchanges is None:
        counted = study.counted(plan, 0)
        exchanges = counted["tensor exchanges"] + counted["sequence exchanges"]
        assert exchanges >= 4 * len(study.layers)
    assert clock.latency(plan, 0) == exchanges
    assert clock.estimate(plan)[0].latency == 4 * exchanges, "once a micro-batch"
    free = Clock(study, replace(cluster, begin=0.0)).estimate(plan)[0]
    assert free.latency == 0


def test_more_rows_at_once_cost_less_a_row_where_weights_and_launches_count(study):
    cluster = Cluster(H100, 8, launch=0.0)
    one, four = (Layout(8, expert=8, micro_batch=rows, micro_batches=8 // rows) for rows in (1, 4))
    clock = Clock(study, cluster)
    assert 4 * clock.arithmetic(one, 0) >= clock.arithmetic(four, 0) >= clock.arithmetic(one, 0)
    launched = Clock(study, replace(cluster, launch=1.0))
    assert launched.arithmetic(one, 0) == launched.arithmetic(four, 0), "as many kernels, of more rows"


def test_what_a_row_counts_holds_for_more_rows(study):
    for tensor, sequence in ((1, 1), (2, 2)):
        for recompute in (False, True):
            one = study.row(tensor, sequence, recompute)
            three = study.trace(tensor, sequence, 1, 3, recompute, 1).totals
            for name, counted in one.items():
                kernels = counted["kernels"]
                # A batch of one saves some copies: its transposed heads lie as a product wants them.
                assert three[name]["kernels"] == pytest.approx(kernels, rel=0.1, abs=3)
                for what in counted.keys() - {"kernels"}:
                    times = 1 if what.endswith("exchanges") else 3
                    assert three[name][what] == times * counted[what], (name, what)


def test_micro_batches_are_searched_and_experts_that_no_stage_seats_are_counted(study):
    left_out: Counter = Counter()
    found = list(layouts(study, Cluster(H100, 8), 16, left_out))
    rows = {(one.data, one.micro_batch) for one in found}
    assert {size for data, size in rows if data == 1} == set(MICRO_BATCHES)
    assert {size for data, size in rows if data == 8} == {1, 2}
    assert all(one.data * one.micro_batch * one.micro_batches == 16 for one in found)
    assert all(8 // one.pipeline % one.expert == 0 for one in found)
    assert left_out[UNSEATED] > 0
