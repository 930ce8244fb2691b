"""Placement: which rank holds which expert, and on which seat.

Every rank lists its experts, trainable ones first, so that a rank's weights are two stacked spans: `trainable` and
`frozen`. Both spans have the same number of seats on every rank. Where a rank has fewer experts than that, the last
seats of the span stay empty ("pad seats"): they hold zeros, no token is ever routed to them, so their gradients are
zero and AdamW leaves them zero. This buys one property on which everything distributed rests: *all ranks hold the
same parameters in the same shapes*, whatever the placement, so ZeRO cuts its buckets at the same places everywhere and
every rank takes part in the same collectives, also where all of its own experts are frozen.

A frozen expert may sit on several ranks: it has no gradient, so its copies stay equal and cost memory alone. The lowest
of these ranks *owns* it: where each expert counts once, as in an export, the owner answers for it. `Placement.copies`
tells a rank where to send its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_dist.errors import UserError
from moe_dist.moe.copies import Copies, Shares, source_shares
from moe_dist.moe.replicas import place_with_copies


@dataclass(frozen=True)
class Placement:
    """The experts of one layer on the P ranks of an expert group.

    `ranks[r]` holds the global ids of rank r's experts in seat order, trainable before frozen. Every id of
    `range(num_experts)` occurs; frozen ones may occur on several ranks. `trainable` is the global set, the same on
    every rank. `load_E`, in any unit, decides what each copy of an expert gets; None takes all experts for alike.
    `ranks_per_node`: consecutive ranks of the group that share a node; None puts all on one.
    """

    num_experts: int
    ranks: tuple[tuple[int, ...], ...]
    trainable: frozenset[int]
    load_E: tuple[float, ...] | None = None
    ranks_per_node: int | None = None

    def __post_init__(self):
        held = [expert for rank in self.ranks for expert in rank]
        if sorted(set(held)) != list(range(self.num_experts)) or any(len(set(r)) < len(r) for r in self.ranks):
            raise UserError(
                f"a placement must hold each expert of 0..{self.num_experts - 1}, and no rank the same one twice; got "
                f"{[list(rank) for rank in self.ranks]}"
            )
        twice = sorted(expert for expert in self.trainable if held.count(expert) > 1)
        if twice:
            raise UserError(
                f"trainable experts {twice} sit on several ranks: an expert that trains is placed exactly once"
            )
        if not self.trainable <= set(held):
            unknown = sorted(self.trainable - set(held))
            raise UserError(
                f"trainable experts {unknown} do not exist: this layer has experts 0..{self.num_experts - 1}"
            )
        for rank in self.ranks:
            flags = [expert in self.trainable for expert in rank]
            assert flags == sorted(flags, reverse=True), "trainable experts come first on each rank"

    @cached_property
    def trainable_seats(self) -> int:
        """Seats of the trainable span, the same on every rank (0: nothing in this layer trains anywhere)."""
        return max(sum(e in self.trainable for e in rank) for rank in self.ranks)

    @cached_property
    def frozen_seats(self) -> int:
        """Seats of the frozen span, the same on every rank."""
        return max(sum(e not in self.trainable for e in rank) for rank in self.ranks)

    def seat_ids(self, rank: int) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
        """Global expert ids on the seats of rank's trainable and frozen span; None marks a pad seat."""
        train = [e for e in self.ranks[rank] if e in self.trainable]
        frozen = [e for e in self.ranks[rank] if e not in self.trainable]
        return (
            tuple(train + [None] * (self.trainable_seats - len(train))),
            tuple(frozen + [None] * (self.frozen_seats - len(frozen))),
        )

    @cached_property
    def held(self) -> tuple[int, ...]:
        """Seats that hold an expert, of each rank."""
        return tuple(len(rank) for rank in self.ranks)

    @cached_property
    def position(self) -> tuple[int, ...]:
        """Of each expert, its owner's place in the rank-major order of all seats: the order in which rows are sent."""
        order = [expert for rank in self.ranks for expert in rank]
        return tuple(order.index(expert) for expert in range(self.num_experts))

    @cached_property
    def owner(self) -> tuple[int, ...]:
        """Of each expert, the lowest rank that holds it."""
        return tuple(
            next(rank for rank, held in enumerate(self.ranks) if expert in held) for expert in range(self.num_experts)
        )

    @cached_property
    def copied(self) -> dict[int, tuple[int, ...]]:
        """The experts that sit on several ranks, and on which."""
        where = {e: tuple(rank for rank, held in enumerate(self.ranks) if e in held) for e in range(self.num_experts)}
        return {expert: ranks for expert, ranks in where.items() if len(ranks) > 1}

    def copies(self, rank: int) -> Copies:
        """Where the tokens of `rank` go; made once."""
        if rank not in self._copies:
            self._copies[rank] = Copies(self.ranks, self.num_experts, self._shares, rank)
        return self._copies[rank]

    @cached_property
    def fractions(self) -> tuple[dict[int, float], ...]:
        """Of each rank, the part of each of its experts' tokens that it computes, where all ranks send alike."""
        parts = [dict.fromkeys(rank, 1.0) for rank in self.ranks]
        for expert, (holders, share_PC) in self._shares.items():
            for holder, part in zip(holders, share_PC.mean(axis=0).tolist(), strict=True):
                parts[holder][expert] = part
        return tuple(parts)

    @cached_property
    def _copies(self) -> dict[int, Copies]:
        return {}

    @cached_property
    def _shares(self) -> Shares:
        loads = (1.0,) * self.num_experts if self.load_E is None else self.load_E
        per_node = self.ranks_per_node or len(self.ranks)
        return source_shares(loads, self.ranks, [rank // per_node for rank in range(len(self.ranks))])


def contiguous(num_experts: int, *, ranks: int, trainable: Iterable[int] | None = None) -> Placement:
    """Rank r gets the r-th run of consecutive ids; the first `num_experts % ranks` ranks hold one more.

    `trainable` None means all of them.
    """
    train = frozenset(range(num_experts)) if trainable is None else frozenset(trainable)
    short, longer = divmod(num_experts, ranks)
    held, start = [], 0
    for rank in range(ranks):
        stop = start + short + (rank < longer)
        held.append(range(start, stop))
        start = stop
    return from_lists(held, num_experts=num_experts, trainable=train)


def from_lists(
    lists: Iterable[Iterable[int]],
    *,
    num_experts: int,
    trainable: Iterable[int],
    load_E: Sequence[float] | None = None,
    ranks_per_node: int | None = None,
) -> Placement:
    """A placement from any lists of ids, one a rank; within a rank trainable experts are moved to the front.

    load_E, ranks_per_node: see `Placement`; they matter where an expert is in several lists.
    """
    train = frozenset(trainable)
    seated = tuple(tuple(sorted(held, key=lambda e: (e not in train, e))) for held in lists)
    loads = None if load_E is None else tuple(float(load) for load in load_E)
    return Placement(num_experts, seated, train, loads, ranks_per_node)


def balance(load_E: Sequence[float], *, ranks: int, trainable: Iterable[int] = (), spare: int = 0) -> list[list[int]]:
    """Spread experts over ranks so that both the load and the trainable experts are even.

    load_E: tokens (or any non-negative measure) of each expert; a sequence or a tensor. Returns one list of ids a
    rank, trainable first; the lengths of the lists and their counts of trainable experts each differ by at most one.
    The same input gives the same lists everywhere.

    spare: at the end of each list come up to so many copies of frozen experts of other ranks (`moe.replicas`). What was
    said of lengths and counts holds for what stands before them.
    """
    loads = [float(load) for load in load_E]
    train = set(trainable)
    if ranks < 1:
        raise UserError(f"balance needs at least one rank, got ranks={ranks}")
    if any(not 0 <= load < float("inf") for load in loads):
        raise UserError("balance needs loads that are finite numbers of at least zero")
    if not train <= set(range(len(loads))):
        raise UserError(
            f"trainable experts {sorted(train - set(range(len(loads))))} do not exist: there are {len(loads)}"
        )
    if spare < 0:
        raise UserError(f"balance needs spare={spare} to be at least zero")
    return place_with_copies(lambda given: _spread(given, ranks, train), loads, train, spare)


def _spread(loads: list[float], ranks: int, train: set[int]) -> list[list[int]]:
    """Every expert once.

    Longest processing time first gives a start: the heaviest expert to the least loaded rank that still has room, the
    trainable ones before the frozen ones, since their weight gradients and optimizer bytes leave less freedom. Then
    experts of the heaviest rank are exchanged with those of others for as long as that lowers the largest load.
    """
    held: list[list[int]] = [[] for _ in range(ranks)]
    total = [0.0] * ranks
    frozen = set(range(len(loads))) - train
    # Trainable experts alone must come out even; then all experts together.
    for ids, count in ((train, len(train)), (frozen, len(loads))):
        short, longer = divmod(count, ranks)
        for expert in sorted(ids, key=lambda e: (-loads[e], e)):
            used = sum(len(rank) > short for rank in held)
            open_ranks = [r for r in range(ranks) if len(held[r]) < short + (used < longer)]
            chosen = min(open_ranks, key=lambda r: (total[r], len(held[r]), r))
            held[chosen].append(expert)
            total[chosen] += loads[expert]
    return _exchange(held, loads, train)


def _exchange(held: list[list[int]], loads: list[float], train: set[int]) -> list[list[int]]:
    """Exchange pairs of experts between ranks until none lowers the larger load of its two ranks.

    The heaviest rank comes first, since its load is what counts; where it is stuck, an exchange between two others may
    set it free. A pair is either both trainable or both frozen; or one of each, where the rank that gives the trainable
    one has one more of them than the other, so that the two counts trade places.
    """
    load_E, trains_E = np.array(loads, dtype=np.float64), np.isin(np.arange(len(loads)), sorted(train))
    rank_E = np.empty(len(loads), dtype=np.int64)
    for rank, ids in enumerate(held):
        rank_E[ids] = rank
    tries = 16  # at setting the heaviest rank free; they look at all pairs, which takes a while with many experts
    # Every exchange lowers the sum of squared loads, so this ends; the bound is for loads that differ by rounding.
    for _ in range(8 * len(loads)):
        total_P = np.bincount(rank_E, weights=load_E, minlength=len(held))
        heaviest = np.flatnonzero(rank_E == np.argmax(total_P))
        pair = _best_pair(heaviest, load_E, trains_E, rank_E, total_P)
        if pair is None and tries:
            tries -= 1
            pair = _best_pair(np.arange(len(loads)), load_E, trains_E, rank_E, total_P)
        if pair is None:
            break
        rank_E[list(pair)] = rank_E[list(pair[::-1])]
    return [
        sorted(np.flatnonzero(rank_E == rank).tolist(), key=lambda e: (e not in train, -loads[e], e))
        for rank in range(len(held))
    ]


def _best_pair(
    give_G: np.ndarray, load_E: np.ndarray, trains_E: np.ndarray, rank_E: np.ndarray, total_P: np.ndarray
) -> tuple[int, int] | None:
    """The exchange of an expert of `give_G` for any expert that lowers the larger load of their ranks the most."""
    trains_P = np.bincount(rank_E[trains_E], minlength=len(total_P))
    lighter_GE = load_E[give_G][:, None] - load_E[None, :]
    gap_GE = total_P[rank_E[give_G]][:, None] - total_P[rank_E][None, :]
    moves_GE = trains_E[give_G][:, None].astype(np.int64) - trains_E[None, :]
    surplus_GE = trains_P[rank_E[give_G]][:, None] - trains_P[rank_E][None, :]
    allowed_GE = (moves_GE == 0) | (moves_GE == surplus_GE)
    # Of the heavier rank's load goes lighter, to the other's comes lighter: the larger one falls by the lesser of both.
    gain_GE = np.where(allowed_GE, np.minimum(lighter_GE, gap_GE - lighter_GE), 0.0)
    best = int(np.argmax(gain_GE)) if gain_GE.size else 0
    if not gain_GE.size or gain_GE.flat[best] <= 1e-12 * total_P.max():
        return None
    return int(give_G[best // len(load_E)]), best % len(load_E)
