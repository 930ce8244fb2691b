"""The order of rows does not depend on ranks, micro-batches or interruptions."""

import numpy as np
import pytest

from moe_dist.data.sampler import IndexSampler, rank_share, shuffle, weighted_cycle
from moe_dist.errors import UserError


def run(sampler, size, steps, ranks=1, micro_batch=1):
    """Rows of `steps` global batches as the ranks saw them, step by step."""
    seen = []
    for _ in range(steps):
        batch = sampler.next_batch(size)
        shares = [rank_share(batch, rank=r, ranks=ranks, micro_batch=micro_batch) for r in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        assert all(len(micro) == micro_batch for share in shares for micro in share)
        seen.append([row for share in shares for micro in share for row in micro if row is not None])
    return seen


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (1, 5), (2, 1), (3, 2), (4, 3), (16, 1), (7, 4)])
def test_union_of_ranks_is_the_same_at_any_layout(ranks, micro_batch):
    plain = run(IndexSampler([37, 11], weights=[3, 1], seed=5), 10, 12)
    other = run(IndexSampler([37, 11], weights=[3, 1], seed=5), 10, 12, ranks, micro_batch)
    assert [sorted(step) for step in other] == [sorted(step) for step in plain]
    assert all(len(step) == 10 for step in other)


def test_micro_batches_of_a_step_are_its_rows_in_order():
    batch = list(range(8))
    assert rank_share(batch, rank=0, ranks=2, micro_batch=2) == [[0, 1], [4, 5]]
    assert rank_share(batch, rank=1, ranks=2, micro_batch=2) == [[2, 3], [6, 7]]
    assert rank_share(batch[:5], rank=1, ranks=2, micro_batch=2) == [[2, 3], [None, None]]
    assert rank_share(batch[:1], rank=3, ranks=4, micro_batch=1) == [[None]]


@pytest.mark.parametrize("size", [1, 3, 7, 10, 64])
def test_each_epoch_holds_every_row_once_whatever_the_batch(size):
    rows = 23
    sampler = IndexSampler([rows], seed=1)
    drawn = [row for _ in range(-(-4 * rows // size)) for _, row in sampler.next_batch(size)]
    epochs = [drawn[i * rows : (i + 1) * rows] for i in range(4)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_interrupted_runs_at_changing_world_sizes_skip_and_repeat_nothing():
    options = {"rows": [19, 40], "weights": [1, 2], "seed": 3, "fingerprint": "f"}
    whole = run(IndexSampler(**options), 6, 30)
    state, seen = None, []
    for steps, ranks, micro_batch in [(1, 1, 2), (7, 4, 1), (9, 2, 3), (2, 3, 1), (11, 1, 6)]:
        sampler = IndexSampler(**options)
        if state is not None:
            sampler.load_state_dict(state)
        seen += run(sampler, 6, steps, ranks, micro_batch)
        state = sampler.state_dict()
    assert [sorted(step) for step in seen] == [sorted(step) for step in whole]
    assert state == {"seed": 3, "position": 180, "fingerprint": "f"}


def test_global_batch_size_may_change_on_resume():
    sampler = IndexSampler([50], seed=2)
    drawn = sampler.next_batch(8) + sampler.next_batch(8)
    other = IndexSampler([50], seed=2)
    other.load_state_dict(sampler.state_dict())
    drawn += other.next_batch(34)
    assert sorted(row for _, row in drawn) == list(range(50))


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.7, 0.2, 0.1], [1, 1000, 5]])
def test_shares_hold_in_every_window(weights):
    sampler = IndexSampler([10] * len(weights), weights=weights)
    drawn = np.array([source for source, _ in sampler.next_batch(20_000)])
    share = np.array(weights) / np.sum(weights)
    assert np.abs(np.bincount(drawn, minlength=len(weights)) / len(drawn) - share).max() < 1 / 2000
    for source, expected in enumerate(share):
        prefix = np.cumsum(drawn == source)
        lag = prefix - expected * np.arange(1, len(drawn) + 1)
        assert np.abs(lag).max() < 1.5 + len(drawn) / 2000


def test_small_weight_still_gets_its_place():
    assert np.bincount(weighted_cycle([1.0, 1e-9], 2)).tolist() == [4096, 1]


def test_seed_and_source_change_the_order():
    orders = {tuple(shuffle(30, *key)) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(30)) for order in orders)


def test_shuffle_is_the_same_on_every_machine_and_version():
    assert shuffle(10, 7, 0, 3).tolist() == [8, 3, 9, 1, 5, 6, 0, 2, 7, 4]
    assert shuffle(1, 7).tolist() == [0]


def test_other_data_or_seed_is_refused():
    state = IndexSampler([5], seed=1, fingerprint="a" * 64).state_dict()
    with pytest.raises(UserError, match="not that of the checkpoint"):
        IndexSampler([5], seed=1, fingerprint="b" * 64).load_state_dict(state)
    with pytest.raises(UserError, match="seed 1, the run has 2"):
        IndexSampler([5], seed=2, fingerprint="a" * 64).load_state_dict(state)


@pytest.mark.parametrize(
    ("rows", "weights"), [([], None), ([3, 0], None), ([3], [0.0]), ([3, 3], [1.0]), ([3], [float("nan")])]
)
def test_sources_that_cannot_be_drawn_from(rows, weights):
    with pytest.raises(UserError):
        IndexSampler(rows, weights=weights)


def test_streams_are_drawn_in_rising_order_and_epochs_are_told():
    sampler = IndexSampler([4, None], weights=[1, 1])
    drawn = sampler.next_batch(16)
    assert [row for source, row in drawn if source == 1] == list(range(8))
    assert sampler.epochs() == [2.0, 8.0]
