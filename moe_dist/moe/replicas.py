"""Which frozen experts to copy, and to which ranks: first for an even load, then for fewer rows on the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_dist.moe.splitting import Split, split_load

ENOUGH = 1e-4  # of the level: what is not worth a copy
EQUAL = 1e-3  # levels closer than this are alike: then the wire decides

Lists = list[list[int]]


def place_with_copies(
    spread: Callable[[list[float]], Lists], loads: list[float], trainable: set[int], spare: int
) -> Lists:
    """The lists of a placement with at most `spare` copies of frozen experts at the end of each.

    `spread(loads)` places every expert once. It is asked several times, with the hottest frozen experts one after the
    other taken for weightless: where such an expert has a copy on every rank, its load is wherever the others leave
    room, and none of its tokens has to travel. Of these placements those with the least largest load stay, and of them
    the one that keeps most tokens at home.
    """
    frozen = sorted(set(range(len(loads))) - trainable, key=lambda e: (-loads[e], e))
    found = []
    for count in range(min(spare, len(frozen)) + 1 if spare else 1):
        everywhere = set(frozen[:count])
        lists = spread([0.0 if expert in everywhere else load for expert, load in enumerate(loads)])
        lists = add_copies(lists, loads, trainable, spare)
        split = split_load(loads, lists)
        found.append((split.level, _stays(split, loads, len(lists)), lists))
    least = min(level for level, _, _ in found)
    return max((one for one in found if one[0] <= least * (1 + EQUAL)), key=lambda one: one[1])[2]


def _stays(split: Split, loads: Sequence[float], ranks: int) -> float:
    """The load that copies take from the tokens of their own ranks, beyond what one seat of each expert would."""
    return sum(
        sum(min(part, loads[expert] / ranks) for part in parts.values()) - loads[expert] / ranks
        for expert, parts in split.parts.items()
    )


def add_copies(lists: Sequence[Sequence[int]], loads: Sequence[float], trainable: set[int], spare: int) -> Lists:
    """Copies in up to `spare` seats of each rank, at the end of its list.

    The load is evened out by moving parts of experts from rank to rank, where a part that comes to a rank needs a seat
    there. No rank can get below its trainable experts, which is why the level to reach is theirs where it is above the
    mean. A rank with one spare seat can take from one other rank only, and a rank's load is met exactly only if what
    it gets is at least what it lacks. So whoever has too much, and least to choose from, gives first; it gives to a
    rank that lacks no more than that, or to one that has too much already and can pass it on.

    Seats that are left then take the hottest frozen experts that the rank lacks: their tokens stay at home.
    """
    if not spare:
        return [list(ids) for ids in lists]
    shift = _Shift(lists, loads, trainable, spare)
    while shift.give():
        pass
    held = [list(ids) for ids in shift.held]
    frozen = sorted(set(range(len(loads))) - trainable, key=lambda e: (-loads[e], e))
    for ids, room in zip(held, shift.room, strict=True):
        ids += [expert for expert in frozen if expert not in ids][:room]
    return held


class _Shift:
    """Loads on their way from rank to rank. `parts[r]`: how much of each frozen expert rank r computes."""

    def __init__(self, lists: Sequence[Sequence[int]], loads: Sequence[float], trainable: set[int], spare: int):
        self.held = [list(ids) for ids in lists]
        self.room = [spare] * len(lists)
        self.parts = [{e: loads[e] for e in ids if e not in trainable} for ids in lists]
        self.total = [sum(loads[e] for e in ids) for ids in lists]
        trained = max(sum(loads[e] for e in ids if e in trainable) for ids in lists)
        self.level = max(trained, sum(loads) / len(lists))
        self.least = ENOUGH * self.level
        self.closed: set[tuple[int, int]] = set()  # (rank, expert) that nobody can take anything of
        self.gave: set[int] = set()  # ranks that have given take nothing any more: so it ends

    def give(self) -> bool:
        """Move a part of one expert from a rank that has too much. False where nothing can be moved."""
        choices = []
        for rank, parts in enumerate(self.parts):
            if self.total[rank] > self.level + self.least:
                most = max(
                    ((part, -e) for e, part in parts.items() if part > 0 and (rank, e) not in self.closed), default=None
                )
                if most is not None:
                    choices.append((most[0], rank, -most[1]))
        if not choices:
            return False
        part, giver, expert = min(choices)
        self.gave.add(giver)
        amount = min(part, self.total[giver] - self.level)
        takers = [rank for rank in range(len(self.held)) if self._can_take(rank, expert, amount)]
        if not takers:
            self.closed.add((giver, expert))
            return True
        taker = min(takers, key=lambda rank: self._regret(rank, expert, amount))
        lacks = self.level - self.total[taker]
        if lacks > self.least:
            amount = min(amount, lacks)
        if expert not in self.parts[taker]:
            self.held[taker].append(expert)
            self.room[taker] -= 1
        self.parts[taker][expert] = self.parts[taker].get(expert, 0.0) + amount
        self.parts[giver][expert] -= amount
        self.total[taker] += amount
        self.total[giver] -= amount
        return True

    def _can_take(self, rank: int, expert: int, amount: float) -> bool:
        if rank in self.gave or not (expert in self.parts[rank] or self.room[rank]):
            return False
        too_much = self.total[rank] - self.level
        return too_much < -self.least or max(self.parts[rank].values(), default=0.0) >= max(0.0, too_much) + amount

    def _regret(self, rank: int, expert: int, amount: float) -> tuple[float, float, int]:
        """What the rank would go on lacking with no seat left to get it; of equals the emptiest rank is best."""
        lacks = self.level - self.total[rank]
        last_seat = self.room[rank] - (expert not in self.parts[rank]) <= 0
        wasted = lacks - amount if last_seat else 0.0
        return wasted if wasted > self.least else 0.0, -lacks, rank
