"""A hop: tokens travel to the ranks of a group that they have business with, and what comes of them travels back.

    start     tokens [T,H]  -> one row for each (token, destination), on its way
    land      rows [M,H]    as they have arrived here, in the order of the ranks that sent them
    start_back, sum_back    a row for each received row returns, and each token is the sum of its rows

The backward of `start` is the way back, and that of the way back is `start`: a hop serves both directions of both.
Each (token, k) slot has a *place*, the number of the seat that it goes to among all seats of the expert group, rank
after rank. A sent row is followed by the places and the probabilities of the slots that share it, so that what happens
at its destination needs nothing else. An exchange of another make (between nodes, say) takes the place of this one by
bringing the same rows, places and probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from moe_dist.moe.balance import count_slots
from moe_dist.ops import RowPlan, passes, row_plan
from moe_dist.parallel.collectives import Flight, exchange, start_exchange


@dataclass(frozen=True)
class Slots:
    """T tokens' slots: the places they go to, int64 `[T,K]` (negative: nowhere), and their probabilities `[T,K]`."""

    places_TK: torch.Tensor
    probs_TK: torch.Tensor


def slots_of(places_TK: torch.Tensor, probs_TK: torch.Tensor) -> Slots:
    """Slots with the probabilities as they are computed with: without graph, in fp32 (float64 in float64)."""
    wide = torch.float64 if probs_TK.dtype == torch.float64 else torch.float32
    return Slots(places_TK, probs_TK.detach().to(wide))


@dataclass(frozen=True)
class Way:
    """The group of a hop and who of it holds which place.

    destination_of_place: int64, rank in the group of each place; only places that this hop may meet matter.
    shared: slots of a token with one destination share a row; otherwise each slot has a row of its own.
    counted: the places of each rank of the group whose slots it wants to know the number of: all of them at the last
        hop, none before.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    destination_of_place: torch.Tensor
    shared: bool
    counted: tuple[range, ...]


@dataclass(frozen=True)
class Hop:
    """The plan of one hop for some tokens.

    rows: slots -> sent rows by destination; of slots that share a row only the first has it here.
    row_of_slot_TK: int64, the sent row of every slot, -1 for those that go nowhere.
    send, receive: rows to and from each rank of the group.
    """

    way: Way
    rows: RowPlan
    row_of_slot_TK: torch.Tensor
    send: list[int]
    receive: list[int]

    def start(self, x_TH: torch.Tensor, dtype: torch.dtype) -> Flight:
        """Tokens `[T,H]` -> rows `[M,H]` of that dtype at their destinations."""
        rows_NH = passes.permute(x_TH, self.rows, dtype=dtype)
        return start_exchange(rows_NH, self.send, self.receive, self.way.group, what="rows")

    def start_back(self, y_MH: torch.Tensor) -> Flight:
        """A row for each received one, back to where that came from."""
        return start_exchange(y_MH, self.receive, self.send, self.way.group, what="rows back")

    def sum_back(self, flight: Flight, dtype: torch.dtype) -> torch.Tensor:
        """Tokens `[T,H]`: each the sum of its rows, in fp32 or wider and in the order of k, then rounded to `dtype`."""
        return passes.unpermute(flight.land(), self.rows, dtype=dtype)

    def start_scalars_back(self, scalars_MK: torch.Tensor) -> Flight:
        """One number for each slot that came with a received row (the gradient of its probability)."""
        return start_exchange(scalars_MK, self.receive, self.send, self.way.group, what="scalars back")

    def pick_back(self, flight: Flight) -> torch.Tensor:
        """The numbers of this hop's slots, `[T,K]`; zero for those that went nowhere."""
        scalars_NK = flight.land()
        column_K = torch.arange(self.row_of_slot_TK.shape[1], device=scalars_NK.device) % max(scalars_NK.shape[1], 1)
        if not len(scalars_NK):
            return scalars_NK.new_zeros(self.row_of_slot_TK.shape)
        picked_TK = scalars_NK.flatten()[self.row_of_slot_TK.clamp(min=0) * scalars_NK.shape[1] + column_K]
        return picked_TK.masked_fill(self.row_of_slot_TK < 0, 0)


def plan_hop(parts: list[Slots], way: Way) -> tuple[list[Hop], list[Slots], list[list[int]]]:
    """Plan one hop for several parts of a batch at once: one exchange of counts, one copy of them to the host.

    Returns, a part each: the hop; the slots of the rows that arrive here, `[M,K]` (`[M,1]` where none share); and how
    many slots arrive for each place of this rank (empty lists unless this is the last hop). Collective over the group.
    """
    maps = [_rows_by_destination(slots.places_TK, way) for slots in parts]
    sent = [rows.counts_E[:-1] for rows, _, _ in maps]
    mine = [_counts_for_ranks(rows_Q, slots.places_TK, way) for rows_Q, slots in zip(sent, parts, strict=True)]
    sizes = [len(parts) * (1 + len(places)) for places in way.counted]
    to_send = torch.cat([torch.cat([counts[rank] for counts in mine]) for rank in range(way.size)])
    counts = exchange(to_send, sizes, [sizes[way.rank]] * way.size, way.group, what="counts")
    counts_QCS = counts.view(way.size, len(parts), -1)
    # rows to each rank, rows from each rank, then slots of each place here: the one copy to the host.
    host = torch.cat([torch.stack(sent), counts_QCS[:, :, 0].t(), counts_QCS[:, :, 1:].sum(0)], dim=1).tolist()

    hops, arrived, by_place = [], [], []
    for slots, (every_row, row_of_slot_TK, destination_TK), line in zip(parts, maps, host, strict=True):
        send, receive = line[: way.size], line[way.size : 2 * way.size]
        rows = first_rows(every_row, sum(send))
        row_of_slot_TK = row_of_slot_TK.masked_fill(row_of_slot_TK >= sum(send), -1)
        hops.append(Hop(way, rows, row_of_slot_TK, send, receive))
        arrived.append(_send_slots(slots, rows, destination_TK, send, receive, way))
        by_place.append(line[2 * way.size :])
    return hops, arrived, by_place


def first_rows(plan: RowPlan, rows: int) -> RowPlan:
    """The plan of the first rows alone: the slots of later ones are dropped."""
    if rows == plan.num_rows:
        return plan
    row_of_slot_TK = plan.row_of_slot_TK.masked_fill(plan.row_of_slot_TK >= rows, -1)
    return replace(plan, row_of_slot_TK=row_of_slot_TK, slot_of_row_N=plan.slot_of_row_N[:rows])


def _rows_by_destination(places_TK: torch.Tensor, way: Way) -> tuple[RowPlan, torch.Tensor, torch.Tensor]:
    """(rows by destination, the row of every slot, the destination of every slot).

    Slots that bring no row get one behind all others, at a destination that does not exist: so the number of rows is
    known here, and no device is asked for it. They are cut off when the counts have come to the host.
    """
    nowhere = way.size
    destination_TK = way.destination_of_place[places_TK.clamp(min=0)].masked_fill(places_TK < 0, nowhere)
    firsts_TK = destination_TK
    if way.shared:
        # The first slot of the token with the same destination: it brings the row, the others share it.
        first_TK = (destination_TK[:, :, None] == destination_TK[:, None, :]).to(torch.uint8).argmax(2)
        order_K = torch.arange(places_TK.shape[1], device=places_TK.device)
        firsts_TK = destination_TK.masked_fill(first_TK != order_K, nowhere)
    rows = row_plan(firsts_TK, num_experts=way.size + 1, num_rows=firsts_TK.numel())
    row_of_slot_TK = rows.row_of_slot_TK.long()
    return rows, row_of_slot_TK.gather(1, first_TK) if way.shared else row_of_slot_TK, destination_TK


def _counts_for_ranks(rows_Q: torch.Tensor, places_TK: torch.Tensor, way: Way) -> list[torch.Tensor]:
    """What each rank of the group needs to know: its rows and, at the last hop, the slots of each of its places."""
    by_place = count_slots(places_TK, len(way.destination_of_place))
    return [
        torch.cat([rows, by_place[places.start : places.stop]])
        for rows, places in zip(rows_Q.split(1), way.counted, strict=True)
    ]


def _send_slots(
    slots: Slots, rows: RowPlan, destination_TK: torch.Tensor, send: list[int], receive: list[int], way: Way
) -> Slots:
    """Bring each sent row's places and probabilities after it, as one exchange of whole numbers."""
    top_k = max(destination_TK.shape[1], 1)
    slot_N = rows.slot_of_row_N.long()
    if way.shared:
        token_N = slot_N // top_k
        here_NK = destination_TK[token_N] == destination_TK.flatten()[slot_N, None]
        places_NK = slots.places_TK[token_N].masked_fill(~here_NK, -1)
        probs_NK = slots.probs_TK[token_N].masked_fill(~here_NK, 0)
    else:
        places_NK, probs_NK = slots.places_TK.flatten()[slot_N, None], slots.probs_TK.flatten()[slot_N, None]
    # The bits of the probabilities travel as integers before the places.
    bits = probs_NK.contiguous().view(torch.int32)
    received = exchange(torch.cat([bits, places_NK.to(torch.int32)], dim=1), send, receive, way.group, what="slots")
    bits, places_MK = received.split([bits.shape[1], places_NK.shape[1]], dim=1)
    return Slots(places_MK.long(), bits.clone(memory_format=torch.contiguous_format).view(slots.probs_TK.dtype))
