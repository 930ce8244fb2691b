"""Every document once, rows never too long, and no label that looks back into another document."""

import numpy as np
import pytest

from moe_dist.data.packing import IGNORE, assemble, best_fit_decreasing, collate, cut


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_decreasing_is_a_partition_that_fits(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, size=500)
    groups = best_fit_decreasing(lengths, 64)
    assert sorted(i for group in groups for i in group) == list(range(500))
    sums = [int(lengths[group].sum()) for group in groups]
    assert max(sums) <= 64
    assert sum(a <= 32 for a in sums) <= 1
    assert len(groups) <= np.ceil(lengths.sum() / 64) * 11 / 9 + 1


def test_best_fit_decreasing_matches_the_plain_rule():
    lengths = np.random.default_rng(9).integers(1, 33, size=200)
    room: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [group for group in range(len(room)) if room[group] >= length]
        if fits:
            room[min(fits, key=lambda group: room[group])] -= length
        else:
            room.append(32 - length)
    ours = [32 - int(lengths[group].sum()) for group in best_fit_decreasing(lengths, 32)]
    assert sorted(ours) == sorted(room)


def test_long_documents_are_cut_and_idle_pieces_left_out():
    assert cut(np.ones(10, bool), 4) == [(0, 4), (4, 4), (8, 2)]
    assert cut(np.ones(9, bool), 4) == [(0, 4), (4, 4)]  # one last token would have no label
    loss = np.zeros(12, bool)
    loss[[4, 6]] = True
    assert cut(loss, 4) == [(4, 4)]
    loss[6] = False
    assert cut(loss, 4) == []  # the first token of a piece is never predicted
    assert cut(np.ones(0, bool), 4) == []


def test_row_layout():
    pieces = [(np.array([5, 6, 7]), np.array([1, 1, 1], bool)), (np.array([8, 9, 10]), np.array([1, 0, 1], bool))]
    row = assemble(pieces, 8, pad_id=2)
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 10, 2, 2]
    assert row["labels"].tolist() == [IGNORE, 6, 7, IGNORE, IGNORE, 10, IGNORE, IGNORE]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert row["attention_mask"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert all(values.dtype == np.int64 for values in row.values())


def test_row_of_padding_alone_has_no_label():
    batch = collate([assemble([], 4, pad_id=3), assemble([], 4, pad_id=3)])
    assert batch["input_ids"].tolist() == [[3] * 4] * 2
    assert (batch["labels"] == IGNORE).all()
    assert batch["attention_mask"].sum() == 0
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
