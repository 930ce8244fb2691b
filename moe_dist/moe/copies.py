"""Which copy of an expert computes a token: decided by the token's rank alone, from tables made with the placement.

A frozen expert may sit on several ranks. How much of its load goes to each copy is a matter of the whole placement (see
`moe.splitting`); here that becomes a share of each source rank in each copy. A rank uses its own copy as far as the
load of that rank allows, since then nothing travels; what is left goes to copies on the same node, then to the others.

A rank that sends n slots to an expert numbers them, and slot i takes the copy in bucket (i · STRIDE + start) mod
BUCKETS of a table in which every copy has its share of neighbouring buckets. STRIDE is odd and BUCKETS a power of two,
so BUCKETS consecutive slots visit each bucket once; and STRIDE / BUCKETS is near the golden ratio, which spreads fewer
slots evenly, too. `start` differs by source rank: ranks with a slot each do not all choose the same copy. All of it is
integers: the same ids give the same copies, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moe_dist.moe.splitting import split_load
from moe_dist.ops import row_plan

BUCKETS = 256
STRIDE = 159
GOLDEN, PLASTIC = 0.6180339887498949, 0.7548776662466927  # fractions whose multiples spread evenly, also as pairs

# {expert that sits on several ranks: (those ranks, share `[P, copies]` that each source rank sends to each of them)}
Shares = dict[int, tuple[list[int], np.ndarray]]


class Copies:
    """The ways of one source rank to the experts of a layer.

    experts_of_places: int64 `[places]`, the global id of each *place*; `experts_on(device)` has it there. Places number
    the seats that hold an expert in rank-major order: rank 0's in seat order, then rank 1's.
    """

    def __init__(self, ranks: Sequence[Sequence[int]], num_experts: int, shares: Shares, rank: int):
        """ranks: the experts of each rank in seat order. rank: the source."""
        self.experts_of_places = torch.tensor([expert for held in ranks for expert in held])
        first_P = np.cumsum([0, *map(len, ranks)])
        place_of = [{e: int(first_P[r]) + seat for seat, e in enumerate(held)} for r, held in enumerate(ranks)]
        position_E = np.empty(num_experts, dtype=np.int64)
        for places in reversed(place_of):
            for expert, place in places.items():
                position_E[expert] = place
        self._tables: dict[torch.device, tuple[torch.Tensor, ...]] = {}
        self._position_E = torch.from_numpy(position_E)
        self._starts_E = self._bucket_places = None
        if shares:
            buckets = np.repeat(position_E[:, None], BUCKETS, axis=1)
            for expert, (holders, share_PC) in shares.items():
                places = [place_of[holder][expert] for holder in holders]
                buckets[expert] = np.repeat(places, bucket_counts(share_PC)[rank])
            ids_E = np.arange(num_experts)
            self._starts_E = torch.from_numpy(((rank * GOLDEN + ids_E * PLASTIC) % 1 * BUCKETS).astype(np.int64))
            self._bucket_places = torch.from_numpy(buckets.astype(np.int32))

    def places(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Global expert ids `[T,K]`, int32 or int64, negative where dropped -> the place of each slot, int64 `[T,K]`.

        Negative ids stay as they are. Nothing is communicated, and nothing waits for the device.
        """
        _, position_E, starts_E, bucket_places = self._on(ids_TK.device)
        ids_TK = ids_TK.long()
        dropped_TK = ids_TK < 0
        known_TK = ids_TK.clamp(min=0)
        if bucket_places is None:
            return torch.where(dropped_TK, ids_TK, position_E[known_TK])
        # Dropped slots count as one expert more: so the number of rows is known, and no device is asked for it.
        experts = len(position_E)
        plan = row_plan(ids_TK.masked_fill(dropped_TK, experts), num_experts=experts + 1, num_rows=ids_TK.numel())
        first_E = (plan.counts_E.cumsum(0) - plan.counts_E)[:-1]
        # The number of a slot among those of its expert is its row less the expert's first.
        bucket_TK = (plan.row_of_slot_TK * STRIDE + (starts_E - first_E * STRIDE)[known_TK]) & (BUCKETS - 1)
        return torch.where(dropped_TK, ids_TK, bucket_places[known_TK, bucket_TK].long())

    def experts_on(self, device: torch.device) -> torch.Tensor:
        """`experts_of_places` on a device; copied there once."""
        return self._on(device)[0]

    def _on(self, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        if device not in self._tables:
            tables = (self.experts_of_places, self._position_E, self._starts_E, self._bucket_places)
            self._tables[device] = tuple(None if table is None else table.to(device) for table in tables)
        return self._tables[device]


def source_shares(load_E: Sequence[float], ranks: Sequence[Sequence[int]], node_of: Sequence[int]) -> Shares:
    """The shares that even out the load. load_E: as measured, in any unit. node_of: the node of each rank.

    Rows sum to one. Where all ranks send alike, the means of the columns are the fractions of `split_load`. An expert
    without a load counts as one with very little.
    """
    loads = [float(load) for load in load_E]
    least = 1e-6 * sum(loads) / len(loads) or 1.0
    split = split_load([max(load, least) for load in loads], ranks)
    return {expert: _shares(split.fractions(expert), node_of) for expert in sorted(split.parts)}


def _shares(fractions: dict[int, float], node_of: Sequence[int]) -> tuple[list[int], np.ndarray]:
    holders = sorted(fractions)
    wanted_C = np.array([fractions[holder] for holder in holders]) * len(node_of)  # in units of a source's load
    left_P = np.ones(len(node_of))
    share_PC = np.zeros((len(node_of), len(holders)))

    def send(sources: list[int], copies: list[int]) -> None:
        """As much as both sides have left, in proportion to what each of them has."""
        supply, demand = left_P[sources].sum(), wanted_C[copies].sum()
        amount = min(supply, demand)
        if amount <= 1e-12:
            return
        sent = np.outer(left_P[sources] / supply, wanted_C[copies] / demand) * amount
        share_PC[np.ix_(sources, copies)] += sent
        left_P[sources] = np.maximum(left_P[sources] - sent.sum(axis=1), 0.0)  # rounding must not leave less than none
        wanted_C[copies] = np.maximum(wanted_C[copies] - sent.sum(axis=0), 0.0)

    for copy, holder in enumerate(holders):
        send([holder], [copy])
    for node in sorted(set(node_of)):
        inside = [copy for copy, holder in enumerate(holders) if node_of[holder] == node]
        send([rank for rank, its in enumerate(node_of) if its == node], inside)
    send(list(range(len(node_of))), list(range(len(holders))))
    return holders, share_PC / share_PC.sum(axis=1, keepdims=True)


def bucket_counts(share_PC: np.ndarray) -> np.ndarray:
    """Buckets of each copy for each source rank; every row sums to BUCKETS.

    Rounded so that what one source gives a copy too much, the next ones take back: over all of them the shares hold.
    """
    counts_PC = np.zeros(share_PC.shape, dtype=np.int64)
    owed_C = np.zeros(share_PC.shape[1])
    for rank, share_C in enumerate(share_PC):
        exact_C = share_C * BUCKETS
        given_C = np.floor(exact_C).astype(np.int64)
        behind_C = np.where(share_C > 1e-9, exact_C - given_C + owed_C, -np.inf)
        more = np.argsort(-behind_C, kind="stable")[: BUCKETS - given_C.sum()]
        given_C[more] += 1
        owed_C += exact_C - given_C
        counts_PC[rank] = given_C
    return counts_PC
