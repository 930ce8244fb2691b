"""Dispatch: bring each token's rows to the ranks that hold its experts, and the results back.

    plan      which row goes where: counts by a stable counting sort, one exchange of counts
    dispatch  tokens [T,H] -> rows [R,H] on the experts' ranks, sorted by seat
    combine   rows [R,H]   -> tokens [T,H], weighted by the router's probabilities

Each is a function of tensors and of the plan, which is passed on and never kept. At P = 1 nothing is exchanged and
nothing waits for the device. At P > 1 the plan copies one `int64[2,P]` of row totals to the host (the all-to-all
wants its splits there) and the seat counts that the grouped products need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_dist.moe.placement import Placement
from moe_dist.ops import RowPlan, permute_rows, row_plan, unpermute
from moe_dist.parallel.collectives import all_to_all, exchange_rows
from moe_dist.parallel.grid import Grid


@dataclass(frozen=True)
class DispatchPlan:
    """Where the rows of one layer's tokens go.

    `home`: token slots -> rows in the order of sending (rank-major, then seat).
    `arrival`: received rows (rank-major) -> rows sorted by seat; None where they already are.
    `seat_counts`: rows of each expert that this rank holds, in seat order.
    `counts_E`: this rank's tokens of each expert by global id, int64, for statistics.
    """

    home: RowPlan
    arrival: RowPlan | None
    send: list[int]
    receive: list[int]
    seat_counts: list[int]
    counts_E: torch.Tensor


def plan_dispatch(ids_TK: torch.Tensor, placement: Placement, grid: Grid) -> DispatchPlan:
    """Plan the exchange for the chosen experts ids_TK (global ids; negative: this slot is dropped). Collective.

    Every rank of the expert group must call this for the same layer, also with T = 0.
    """
    position_E = torch.tensor(placement.position, device=ids_TK.device)
    slots_TK = ids_TK.long()
    slots_TK = torch.where(slots_TK < 0, slots_TK, position_E[slots_TK.clamp(min=0)])
    home = row_plan(slots_TK, num_experts=placement.num_experts)
    counts_E = home.counts_E[position_E]
    if grid.expert == 1:
        return DispatchPlan(home, None, [], [], home.counts_E.tolist(), counts_E)

    held = [len(experts) for experts in placement.ranks]
    mine = held[grid.expert_rank]
    received_PS = exchange_rows(home.counts_E, held, [mine] * grid.expert, grid.expert_group)
    received_PS = received_PS.view(grid.expert, mine)
    sent_P = torch.stack([part.sum() for part in home.counts_E.split(held)])
    send, receive = torch.stack([sent_P, received_PS.sum(dim=1)]).tolist()
    arrival = None
    if mine > 1:
        seats = torch.arange(mine, device=ids_TK.device).repeat(grid.expert)
        seat_R = seats.repeat_interleave(received_PS.flatten(), output_size=sum(receive))
        arrival = row_plan(seat_R.unsqueeze(1), num_experts=mine)
    return DispatchPlan(home, arrival, send, receive, received_PS.sum(dim=0).tolist(), counts_E)


def dispatch(x_TH: torch.Tensor, plan: DispatchPlan, grid: Grid) -> torch.Tensor:
    """Tokens `[T,H]` -> the rows `[R,H]` of this rank's experts, sorted by seat."""
    rows_NH = permute_rows(x_TH, plan.home)
    if grid.expert == 1:
        return rows_NH
    rows_RH = all_to_all(rows_NH, plan.send, plan.receive, grid.expert_group)
    return rows_RH if plan.arrival is None else permute_rows(rows_RH, plan.arrival)


def combine(
    rows_RH: torch.Tensor, plan: DispatchPlan, grid: Grid, probs_TK: torch.Tensor, post_norm=None
) -> torch.Tensor:
    """The experts' outputs `[R,H]` -> tokens `[T,H]`: each the sum of its rows times its probabilities.

    `post_norm` (a module, or None) is applied to each row before it is weighted; it acts on rows one by one, so it
    is the same on the token's rank as on the expert's.
    """
    if grid.expert > 1:
        if plan.arrival is not None:
            rows_RH = unpermute(rows_RH, plan.arrival)
        rows_RH = all_to_all(rows_RH, plan.receive, plan.send, grid.expert_group)
    if post_norm is not None:
        rows_RH = post_norm(rows_RH)
    return unpermute(rows_RH, plan.home, probs_TK)
