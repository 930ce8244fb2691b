"""Which rank holds which expert."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from moe_dist.errors import UserError
from moe_dist.moe.placement import Placement, balance, contiguous, from_lists
from moe_dist.moe.splitting import split_load


def test_contiguous_when_experts_do_not_divide():
    assert contiguous(7, ranks=3).ranks == ((0, 1, 2), (3, 4), (5, 6))


def test_spans_are_padded_to_one_size():
    placement = contiguous(6, ranks=3, trainable=[0, 1, 4])
    assert (placement.trainable_seats, placement.frozen_seats) == (2, 2)
    assert placement.seat_ids(0) == ((0, 1), (None, None))
    assert placement.seat_ids(1) == ((None, None), (2, 3))
    assert placement.seat_ids(2) == ((4, None), (5, None))


def test_trainable_experts_come_first():
    placement = from_lists([[0, 1, 2], [3]], num_experts=4, trainable=[2])
    assert placement.ranks == ((2, 0, 1), (3,))
    assert placement.position == (1, 2, 0, 3)


def test_a_placement_holds_every_expert_and_what_trains_once():
    with pytest.raises(UserError, match="must hold each expert"):
        Placement(3, ((0, 1), (1,)), frozenset())
    with pytest.raises(UserError, match="no rank the same one twice"):
        Placement(2, ((0, 1, 1),), frozenset())
    with pytest.raises(UserError, match=r"trainable experts \[1\] sit on several ranks"):
        Placement(3, ((1, 0), (1, 2)), frozenset([1]))
    with pytest.raises(UserError, match="do not exist"):
        contiguous(3, ranks=1, trainable=[5])


def test_seats_of_copies():
    placement = from_lists([[0, 2, 4], [1, 3, 2], [4, 5]], num_experts=6, trainable=[0, 1])
    assert placement.ranks == ((0, 2, 4), (1, 2, 3), (4, 5))
    assert (placement.trainable_seats, placement.frozen_seats, placement.held) == (1, 2, (3, 3, 2))
    assert placement.seat_ids(2) == ((None,), (4, 5))
    assert placement.copied == {2: (0, 1), 4: (0, 2)}
    assert placement.owner == (0, 1, 0, 1, 0, 2)
    assert placement.position == (0, 3, 1, 5, 2, 7)
    assert placement.copies(1) is placement.copies(1)


def test_balance_is_even_in_counts_for_any_input():
    chance = random.Random(0)
    for _ in range(500):
        experts, ranks = chance.randint(1, 20), chance.randint(1, 6)
        train = chance.sample(range(experts), chance.randint(0, experts))
        held = balance(
            [chance.choice([0, 1, 9 * chance.random()]) for _ in range(experts)], ranks=ranks, trainable=train
        )
        sizes, trains = [len(h) for h in held], [len(set(h) & set(train)) for h in held]
        assert sorted(expert for rank in held for expert in rank) == list(range(experts))
        assert max(sizes) - min(sizes) <= 1
        assert max(trains) - min(trains) <= 1


def test_balance_is_even_in_load():
    load_E = torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4])
    held = balance(load_E, ranks=4)
    assert [sum(load_E[e].item() for e in h) for h in held] == [9, 9, 9, 9]


def test_balance_exchanges_what_the_greedy_start_got_wrong():
    """Heaviest first alone ends with 7 and 5."""
    held = balance([3, 3, 2, 2, 2, 0], ranks=2)
    assert sorted(sum([3, 3, 2, 2, 2, 0][e] for e in h) for h in held) == [6, 6]


def test_balance_reaches_the_bound_of_a_hot_expert():
    """The rank of the hottest expert gets the coldest others, no matter how far it is above the mean."""
    held = balance([90, 1, 2, 3, 4, 5, 6, 7], ranks=4)
    assert next(h for h in held if 0 in h) == [0, 1]


def test_balance_moves_load_across_the_classes_where_counts_allow():
    """Three trainable experts on two ranks: the load decides which has two. Within the classes 11 would be left."""
    loads = [6.0, 1.0, 1.0, 5.0, 4.0, 1.0]
    held = balance(loads, ranks=2, trainable=[0, 1, 2])
    assert sorted(len(set(h) & {0, 1, 2}) for h in held) == [1, 2]
    assert max(sum(loads[e] for e in h) for h in held) == 10.0


def test_balance_is_near_perfect_with_many_experts():
    chance = random.Random(2)
    for experts, ranks in ((64, 8), (128, 16), (256, 8)):
        loads = [chance.lognormvariate(0, 1) for _ in range(experts)]
        held = balance(loads, ranks=ranks, trainable=range(0, experts, 9))
        assert max(sum(loads[e] for e in h) for h in held) < 1.01 * sum(loads) / ranks
        assert balance(loads, ranks=ranks, trainable=range(0, experts, 9)) == held


def test_copies_are_of_frozen_experts_and_come_last():
    chance = random.Random(5)
    for _ in range(200):
        experts, ranks, spare = chance.randint(1, 20), chance.randint(1, 5), chance.randint(0, 3)
        train = chance.sample(range(experts), chance.randint(0, experts))
        loads = [chance.choice([0, 1, 9 * chance.random()]) for _ in range(experts)]
        held = balance(loads, ranks=ranks, trainable=train, spare=spare)
        assert balance(loads, ranks=ranks, trainable=train, spare=spare) == held
        trains = [len(set(ids) & set(train)) for ids in held]
        assert max(trains) - min(trains) <= 1

        def fits(counts, held=held, spare=spare, experts=experts, frozen=set(range(experts)) - set(train)) -> bool:
            """Whether lists cut there are an even partition, and copies that fill the spare seats."""
            owned = [ids[:count] for ids, count in zip(held, counts, strict=True)]
            copies = [ids[count:] for ids, count in zip(held, counts, strict=True)]
            return sorted(itertools.chain(*owned)) == list(range(experts)) and all(
                len(more) == min(spare, len(frozen - set(its))) and set(more) <= frozen - set(its)
                for its, more in zip(owned, copies, strict=True)
            )

        assert any(map(fits, itertools.product((experts // ranks, -(-experts // ranks)), repeat=ranks)))
        assert all(len(set(ids)) == len(ids) for ids in held)
        assert from_lists(held, num_experts=experts, trainable=train, load_E=loads).trainable == set(train)


@pytest.mark.parametrize(("experts", "ranks", "spare"), [(64, 16, 1), (256, 32, 1), (64, 16, 2), (16, 4, 1)])
def test_one_copy_a_rank_makes_the_load_even(experts, ranks, spare):
    """Unless an expert that trains is hotter than the mean rank: then the others stay below it."""
    chance = random.Random(experts)
    for spread in (0.5, 1.0, 2.0):
        loads = [chance.lognormvariate(0, spread) for _ in range(experts)]
        train = chance.sample(range(experts), experts // 12)
        held = balance(loads, ranks=ranks, trainable=train, spare=spare)
        level = split_load(loads, held).level
        least = max(sum(loads) / ranks, max(loads[e] for e in train))
        assert least * (1 - 1e-9) <= level < 1.003 * least


def test_a_frozen_expert_above_the_mean_goes_to_as_many_ranks_as_it_takes():
    held = balance([70, 2, 3, 5, 5, 5, 5, 5], ranks=4, spare=1)
    assert split_load([70, 2, 3, 5, 5, 5, 5, 5], held).level == pytest.approx(25.0)
    assert sum(0 in ids for ids in held) == 4


def test_the_hottest_frozen_expert_stays_at_home_where_the_load_allows():
    loads = [9.0] + [4.0] * 15
    held = balance(loads, ranks=4, trainable=[15], spare=1)
    assert all(0 in ids for ids in held)
    placement = from_lists(held, num_experts=16, trainable=[15], load_E=loads)
    assert max(sum(loads[e] * part for e, part in parts.items()) for parts in placement.fractions) <= 17.25 + 1e-6
    assert [len(ids) for ids in held] == [5] * 4


def test_balance_refuses_nonsense():
    with pytest.raises(UserError, match="loads"):
        balance([1.0, float("nan")], ranks=1)
    with pytest.raises(UserError, match=r"trainable experts \[9\]"):
        balance([1.0], ranks=1, trainable=[9])
    with pytest.raises(UserError, match="spare=-1"):
        balance([1.0], ranks=1, spare=-1)
