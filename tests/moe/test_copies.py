"""Which copy a slot goes to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_dist.moe.copies import BUCKETS, bucket_counts, source_shares
from moe_dist.moe.placement import Placement, balance, contiguous, from_lists


def test_without_copies_a_place_is_a_position():
    placement = from_lists([[0, 4, 2], [3, 1]], num_experts=5, trainable=[4])
    ids = torch.tensor([[0, 1], [4, -1], [3, 2]], dtype=torch.int32)
    for rank in range(2):
        copies = placement.copies(rank)
        assert copies.places(ids).tolist() == [[1, 3], [0, -1], [4, 2]]
        assert copies.places(ids).dtype == torch.int64
        assert copies.experts_of_places.tolist() == [4, 0, 2, 1, 3]
        assert copies.places(ids[:0]).shape == (0, 2)


def hot(load_E=None) -> Placement:
    """Expert 0 on ranks 0, 1 and 3 of four; expert 1 on 1 and 2."""
    return from_lists([[0, 2], [0, 1], [1, 3], [0, 4]], num_experts=5, trainable=[4], load_E=load_E)


def ranks_of(placement: Placement, places: torch.Tensor) -> torch.Tensor:
    owner = torch.repeat_interleave(torch.arange(len(placement.held)), torch.tensor(placement.held))
    return torch.where(places < 0, places, owner[places.clamp(min=0)])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_slot_goes_to_a_seat_of_its_expert(dtype):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 5, (301, 3), generator=generator).to(dtype)
    placement = hot()
    for rank in range(4):
        copies = placement.copies(rank)
        places = copies.places(ids)
        assert torch.equal(places < 0, ids < 0)
        assert torch.equal(copies.experts_of_places[places.clamp(min=0)][ids >= 0], ids[ids >= 0].long())
        assert torch.equal(copies.places(ids), places)
        assert copies.places(ids[:0]).shape == (0, 3)
    assert (copies.places(torch.full((4, 2), -1)) == -1).all()


def test_a_rank_prefers_its_own_copy():
    placement = hot(load_E=[6, 2, 1, 1, 1])
    ids = torch.zeros(60, 1, dtype=torch.int64)
    for rank in (0, 1, 3):
        assert (ranks_of(placement, placement.copies(rank).places(ids)) == rank).all()
    assert set(ranks_of(placement, placement.copies(2).places(ids)).flatten().tolist()) <= {0, 1, 3}


def test_then_a_copy_on_its_node():
    lists, ids = [[0, 1], [2, 4], [3, 5], [0, 6]], torch.zeros(256, 1, dtype=torch.int64)
    for per_node, expected in ((None, {1: {0: 128, 3: 128}, 2: {0: 128, 3: 128}}), (2, {1: {0: 256}, 2: {3: 256}})):
        placement = from_lists(lists, num_experts=7, trainable=[], ranks_per_node=per_node)
        for rank, used in expected.items():
            chosen = ranks_of(placement, placement.copies(rank).places(ids)).flatten().tolist()
            assert {holder: chosen.count(holder) for holder in set(chosen)} == used


def test_shares_add_up_to_the_split():
    chance = np.random.default_rng(0)
    for _ in range(50):
        experts, ranks = int(chance.integers(4, 20)), int(chance.integers(2, 7))
        loads = chance.lognormal(0, 1, experts) * (chance.random(experts) < 0.8)
        held = balance(loads, ranks=ranks, trainable=[0, 1], spare=2)
        placement = from_lists(held, num_experts=experts, trainable=[0, 1], load_E=loads)
        for per_node in (ranks, 2):
            shares = source_shares(loads, held, [rank // per_node for rank in range(ranks)])
            for expert, (holders, share_PC) in shares.items():
                assert share_PC.sum(axis=1) == pytest.approx(np.ones(ranks))
                means = [placement.fractions[holder][expert] for holder in holders]
                assert share_PC.mean(axis=0) == pytest.approx(means, abs=1e-9)
                counts = bucket_counts(share_PC)
                assert (counts.sum(axis=1) == BUCKETS).all()
                assert (counts >= 0).all()
                assert np.abs(counts - BUCKETS * share_PC).max() < 2
                assert np.abs((counts - BUCKETS * share_PC).sum(axis=0)).max() < 2
        part_E = np.zeros(experts)
        for parts in placement.fractions:
            for expert, part in parts.items():
                part_E[expert] += part
        assert part_E == pytest.approx(np.ones(experts))


def test_few_slots_split_evenly_and_ranks_with_one_do_not_agree():
    placement = from_lists([[0, 1], [0, 2], *([e] for e in range(3, 17))], num_experts=17, trainable=[])
    for slots in (1, 2, 3, 5, 8, 13):
        ids = torch.zeros(slots, 1, dtype=torch.int64)
        per_rank = [ranks_of(placement, placement.copies(rank).places(ids)).flatten() for rank in range(2, 16)]
        for chosen in per_rank:
            assert abs(2 * int(chosen.sum()) - slots) <= 2
        together = int(torch.cat(per_rank).sum())
        assert abs(together / (14 * slots) - 0.5) < 0.1


def test_the_choice_follows_the_slots_of_an_expert_not_its_tokens():
    """Of every second token all copies get the same, where a sequence over tokens could favour one."""
    placement = from_lists([[0, 1], [0, 2], [3]], num_experts=4, trainable=[])
    ids = torch.tensor([[0], [3]]).repeat(128, 1)
    chosen = ranks_of(placement, placement.copies(2).places(ids))[::2].flatten()
    assert abs(int(chosen.sum()) - 64) <= 1


def test_one_rank_or_nothing_frozen_means_no_copies():
    assert balance([1.0, 2.0], ranks=1, spare=3) == [[1, 0]]
    assert balance([1.0, 2.0], ranks=2, trainable=[0, 1], spare=3) == balance([1.0, 2.0], ranks=2, trainable=[0, 1])
    assert contiguous(4, ranks=2).copied == {}
