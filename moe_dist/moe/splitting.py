"""Splitting the load of experts that sit on several ranks so that the busiest rank has as little as possible.

An expert with copies may send any part of its load to each of them. The least possible largest load is that of the
worst set of ranks: what only they can compute, over their number. It is found by a maximal flow from experts to ranks:
where it is stuck below the whole load, the ranks that it still reaches are such a set, the level rises to theirs, and
the flow goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

ROUNDING = 1e-9  # of the level: loads are sums of floats
ROUNDS = 8  # of evening out


@dataclass(frozen=True)
class Split:
    """`level`: the largest load of a rank. `parts[e][r]`: what rank r takes of expert e, for every expert that sits on
    several ranks."""

    level: float
    parts: dict[int, dict[int, float]]

    def fractions(self, expert: int) -> dict[int, float]:
        """The share of each of the expert's ranks; even where it has no load."""
        parts = self.parts[expert]
        whole = sum(parts.values())
        return {rank: part / whole if whole else 1 / len(parts) for rank, part in parts.items()}


def split_load(load_E: Sequence[float], ranks: Sequence[Sequence[int]]) -> Split:
    """The split with the least largest load. `ranks[r]` are the experts that rank r holds.

    Of all splits with that level it starts from the one that travels least: as far as the level allows, each copy
    takes at least what the tokens of its own rank send to the expert, load / P. Below the level it is even: what is
    left of an expert's load goes to the emptiest of its ranks, so that no rank is full without need.
    """
    holders: dict[int, list[int]] = {}
    for rank, held in enumerate(ranks):
        for expert in held:
            holders.setdefault(expert, []).append(rank)
    copied = {expert: places for expert, places in holders.items() if len(places) > 1}
    fixed_P = [float(sum(load_E[expert] for expert in held if expert not in copied)) for held in ranks]
    level = max(*fixed_P, sum(load_E) / len(ranks), 0.0)
    while True:
        flow = _Flow(load_E, copied, fixed_P, level)
        reached = flow.fill()
        if reached is None:
            for _ in range(ROUNDS):
                flow.even_out()
            return Split(level, flow.parts)
        inside = sum(load_E[expert] for expert, places in copied.items() if reached.issuperset(places))
        risen = (sum(fixed_P[rank] for rank in reached) + inside) / len(reached)
        level = max(risen, level * (1 + ROUNDING))


class _Flow:
    """A flow of load from experts with copies to their ranks, none of which takes more than `level`."""

    def __init__(self, load_E: Sequence[float], copied: dict[int, list[int]], fixed_P: Sequence[float], level: float):
        self.level, self.slack = level, ROUNDING * level
        self.total_P = list(fixed_P)
        self.missing, self.own = {}, {}
        self.parts: dict[int, dict[int, float]] = {}
        for expert in sorted(copied, key=lambda e: (-load_E[e], e)):
            own = self.own[expert] = load_E[expert] / len(fixed_P)
            parts = {rank: max(0.0, min(own, level - self.total_P[rank])) for rank in copied[expert]}
            for rank, part in parts.items():
                self.total_P[rank] += part
            self.parts[expert] = parts
            self.missing[expert] = load_E[expert] - sum(parts.values())

    def fill(self) -> set[int] | None:
        """Place all that is missing. Where that fails: the ranks, all full, from which no load can be moved on."""
        for expert in self.missing:
            while self.missing[expert] > self.slack:
                came_from, end = self._search(expert)
                if end is None:
                    return set(came_from)
                self._push(expert, came_from, end)
        return None

    def _search(self, expert: int) -> tuple[dict[int, tuple[int | None, int]], int | None]:
        """Breadth first from the expert's ranks to one with room: {rank: (rank before it, expert that moves)}."""
        came_from: dict[int, tuple[int | None, int]] = dict.fromkeys(self.parts[expert], (None, expert))
        queue = deque(sorted(came_from, key=lambda rank: (self.total_P[rank], rank)))
        while queue:
            rank = queue.popleft()
            if self.total_P[rank] < self.level - self.slack:
                return came_from, rank
            for other, parts in self.parts.items():
                if parts.get(rank, 0.0) > self.slack:
                    for onward in parts:
                        if onward not in came_from:
                            came_from[onward] = (rank, other)
                            queue.append(onward)
        return came_from, None

    def even_out(self) -> None:
        """Spread what the copies of each expert take beyond their own ranks' tokens anew: no total gets above the
        largest of theirs."""
        for expert, parts in self.parts.items():
            beyond = 0.0
            for rank, part in parts.items():
                more = max(0.0, part - self.own[expert])
                parts[rank] -= more
                self.total_P[rank] -= more
                beyond += more
            rising = sorted(parts, key=lambda rank: (self.total_P[rank], rank))
            # The lowest ranks rise together to a common height that uses up all of it.
            heights = [self.total_P[rank] for rank in rising]
            count = next(
                n for n in range(len(rising), 0, -1) if n * heights[n - 1] - sum(heights[:n]) <= beyond or n == 1
            )
            height = (beyond + sum(heights[:count])) / count
            for rank, low in zip(rising[:count], heights, strict=False):
                parts[rank] += max(0.0, height - low)
                self.total_P[rank] += max(0.0, height - low)

    def _push(self, expert: int, came_from: dict[int, tuple[int | None, int]], end: int) -> None:
        amount, path, rank = min(self.missing[expert], self.level - self.total_P[end]), [], end
        while True:
            before, moved = came_from[rank]
            path.append((before, moved, rank))
            if before is None:
                break
            amount = min(amount, self.parts[moved][before])
            rank = before
        for before, moved, rank in path:
            self.parts[moved][rank] += amount
            if before is not None:
                self.parts[moved][before] = max(0.0, self.parts[moved][before] - amount)
        self.total_P[end] += amount
        self.missing[expert] -= amount
