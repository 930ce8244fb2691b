"""Dispatch: which way the tokens of a layer take to the ranks of their experts, planned before anything moves.

    alltoall   one row for each (token, expert)
    dedup      one row for each (token, rank that holds at least one of its experts)
    node       one row for each (token, node), then inside the node one for each (token, rank)

Whatever the way, what arrives at the experts' rank are M tokens with the seats they go to and their probabilities, and
one row for each of them goes back. At P = 1 nothing travels and the tokens are their own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from moe_dist.errors import UserError
from moe_dist.moe.balance import count_slots
from moe_dist.moe.hop import Hop, Slots, Way, first_rows, plan_hop, slots_of
from moe_dist.moe.placement import Placement
from moe_dist.ops import RowPlan, row_plan
from moe_dist.parallel.grid import Grid

DISPATCHERS = ("auto", "alltoall", "dedup", "node")


@dataclass(frozen=True)
class Part:
    """Some tokens of the batch, the way they take, and what they do at its end.

    tokens: which of the batch. hops: the way, empty at P = 1. seats: the slots of the M tokens that arrive here ->
    rows sorted by seat. probs_MK: their probabilities, fp32 (float64 in float64). seat_counts: rows of each seat.
    """

    tokens: slice
    hops: tuple[Hop, ...]
    seats: RowPlan
    probs_MK: torch.Tensor
    seat_counts: list[int]


@dataclass(frozen=True)
class DispatchPlan:
    """parts: of the batch, in order. counts_E: this rank's tokens of each expert by global id, int64."""

    parts: list[Part]
    counts_E: torch.Tensor


def choose_dispatcher(wish: str, grid: Grid, top_k: int) -> str:
    """What `auto` stands for here: rows are shared wherever a token can have two experts on one rank.

    Raises UserError for `node` where an expert group does not consist of whole nodes.
    """
    if wish == "node" and grid.expert > 1 and grid.across_group is None:
        raise UserError(
            f"moe.dispatcher=node: an expert group of {grid.expert} rank(s) with {grid.node_size} a node lies within "
            "one node or does not fill its nodes; use moe.dispatcher=auto, or a parallel.expert that is a multiple of "
            "the ranks a node (parallel.node_size)"
        )
    if wish != "auto":
        return wish
    if grid.across_group is not None and grid.inside_group is not None:
        return "node"
    return "dedup" if top_k > 1 else "alltoall"


def plan_dispatch(
    ids_TK: torch.Tensor,
    probs_TK: torch.Tensor,
    placement: Placement,
    grid: Grid,
    *,
    dispatcher: str = "auto",
    chunks: int = 1,
) -> DispatchPlan:
    """Plan the ways of the slots ids_TK (global ids; negative: dropped) with their probabilities. Collective.

    The tokens are cut into `chunks` parts that travel one after the other. Every rank of the expert group must call
    this for the same layer, also with T = 0.
    """
    copies = placement.copies(grid.expert_rank)
    places_TK = copies.places(ids_TK)
    counts_E = torch.zeros(placement.num_experts, dtype=torch.int64, device=ids_TK.device)
    experts = copies.experts_on(ids_TK.device)
    counts_E.index_add_(0, experts, count_slots(places_TK, len(experts)))
    tokens = _cut(len(ids_TK), chunks)
    parts = [slots_of(places_TK[part], probs_TK[part]) for part in tokens]
    if grid.expert == 1:
        return DispatchPlan(
            [stay_here(slots, placement.num_experts, cut) for cut, slots in zip(tokens, parts, strict=True)], counts_E
        )

    hops: list[list[Hop]] = []
    for way in _ways(placement, grid, choose_dispatcher(dispatcher, grid, ids_TK.shape[1]), ids_TK.device):
        planned, parts, by_place = plan_hop(parts, way)
        hops.append(planned)
    start = sum(placement.held[: grid.expert_rank])
    held = placement.held[grid.expert_rank]
    done = []
    for index, (slots, counts) in enumerate(zip(parts, by_place, strict=True)):
        seats_MK = torch.where(slots.places_TK < 0, -1, slots.places_TK - start)
        seats = row_plan(seats_MK, num_experts=max(held, 1), num_rows=sum(counts))
        done.append(Part(tokens[index], tuple(hop[index] for hop in hops), seats, slots.probs_TK, counts))
    return DispatchPlan(done, counts_E)


def stay_here(slots: Slots, num_seats: int, tokens: slice = slice(None)) -> Part:
    """The part of tokens that travel nowhere: their places are this rank's seats. One copy of counts to the host."""
    places_TK = slots.places_TK
    # Dropped slots go to a seat that does not exist, behind all others, until the host knows how many there are.
    seats = row_plan(
        places_TK.masked_fill(places_TK < 0, num_seats), num_experts=num_seats + 1, num_rows=places_TK.numel()
    )
    *counts, dropped = seats.counts_E.tolist()
    seats = replace(first_rows(seats, seats.num_rows - dropped), counts_E=seats.counts_E[:-1], num_experts=num_seats)
    return Part(tokens, (), seats, slots.probs_TK, counts)


def _cut(tokens: int, chunks: int) -> list[slice]:
    return [slice(tokens * part // chunks, tokens * (part + 1) // chunks) for part in range(chunks)]


@functools.lru_cache(maxsize=1024)
def _ways(placement: Placement, grid: Grid, dispatcher: str, device: torch.device) -> tuple[Way, ...]:
    """The hops of a dispatcher, made once: a copy of a table to a device in every forward would wait for it."""
    rank_of_place = torch.repeat_interleave(torch.arange(grid.expert), torch.tensor(placement.held)).to(device)
    stops = torch.tensor(placement.held).cumsum(0).tolist()
    places = [range(stop - held, stop) for stop, held in zip(stops, placement.held, strict=True)]
    if dispatcher != "node":
        shared = dispatcher == "dedup"
        return (Way(grid.expert_group, grid.expert_rank, grid.expert, rank_of_place, shared, tuple(places)),)
    node, local = divmod(grid.expert_rank, grid.node_size)
    nodes = grid.expert // grid.node_size
    last = (node * grid.node_size, (node + 1) * grid.node_size)
    across = Way(grid.across_group, node, nodes, rank_of_place // grid.node_size, True, (range(0),) * nodes)
    if grid.inside_group is None:  # one rank a node: the first hop is the last
        return (Way(grid.across_group, node, nodes, rank_of_place, True, tuple(places)),)
    inside = Way(
        grid.inside_group, local, grid.node_size, rank_of_place % grid.node_size, True, tuple(places[slice(*last)])
    )
    return across, inside
