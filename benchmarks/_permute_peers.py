"""permute and unpermute by others: the best that torch operations can be put together to, and two known recipes.

The compositions write each of the four passes by hand into preallocated memory, temporaries included. The recipes
are what Megatron-Core (unfused) and torchtitan do, written from their description, with torch's own autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_dist.ops import RowPlan


@dataclass(frozen=True)
class Problem:
    """Inputs of a case, and one output for each pass, which every contender writes into."""

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    probs_TK: torch.Tensor
    dy_TH: torch.Tensor
    rows_NH: torch.Tensor  # the experts' outputs
    drows_NH: torch.Tensor  # the gradient of the experts' inputs
    plan: RowPlan
    out: dict[str, torch.Tensor]

    @property
    def pass_bytes(self) -> int:
        """What the four passes must move: each reads and writes every operand once."""
        k, size = self.ids_TK.shape[1], self.x_TH.nbytes
        return size * ((1 + k) + (1 + k) + (1 + k) + (1 + 2 * k))


def compositions(problem: Problem) -> dict[str, dict[str, Callable[[], object]]]:
    """pass -> name of the composition -> function that leaves its result in `problem.out`."""
    p, out = problem, problem.out
    (tokens, k), hidden = p.ids_TK.shape, p.x_TH.shape[1]
    slot_of_row_N = p.plan.slot_of_row_N.long()
    row_of_slot_N = p.plan.row_of_slot_TK.reshape(-1).long()
    token_of_row_N = slot_of_row_N // k
    wide_token_of_row_NH = token_of_row_N[:, None].expand(-1, hidden)
    probs_TK = p.probs_TK.to(p.x_TH.dtype)
    factor_N1 = probs_TK.reshape(-1)[slot_of_row_N][:, None]
    by_slot_NH, by_row_NH = torch.empty_like(p.rows_NH), torch.empty_like(p.rows_NH)
    by_slot_TKH = by_slot_NH.view(tokens, k, hidden)
    dots_TK1 = torch.empty(tokens, k, 1, dtype=p.x_TH.dtype)
    dots_N = torch.empty(tokens * k, dtype=p.x_TH.dtype)
    flat_dprobs_N = out["dprobs"].view(-1)

    def to_slots(rows_NH):
        torch.index_select(rows_NH, 0, row_of_slot_N, out=by_slot_NH)

    def sum_by_bmm():
        to_slots(p.rows_NH)
        torch.bmm(probs_TK[:, None], by_slot_TKH, out=out["y"][:, None])

    def sum_by_index_add():
        torch.mul(p.rows_NH, factor_N1, out=by_row_NH)
        out["y"].zero_().index_add_(0, token_of_row_N, by_row_NH)

    def sum_by_scatter_add():
        torch.mul(p.rows_NH, factor_N1, out=by_row_NH)
        out["y"].zero_().scatter_add_(0, wide_token_of_row_NH, by_row_NH)

    def plain_sum():
        to_slots(p.drows_NH)
        torch.sum(by_slot_TKH, 1, out=out["dx"])

    def drows_by_index_select():
        torch.index_select(p.dy_TH, 0, token_of_row_N, out=out["drows"]).mul_(factor_N1)

    def drows_by_bmm():
        torch.bmm(probs_TK[:, :, None], p.dy_TH[:, None], out=by_slot_TKH)
        torch.index_select(by_slot_NH, 0, slot_of_row_N, out=out["drows"])

    def dprobs_by_bmm():
        to_slots(p.rows_NH)
        torch.bmm(by_slot_TKH, p.dy_TH[:, :, None], out=dots_TK1)
        out["dprobs"].copy_(dots_TK1[:, :, 0])

    def shared_gather():  # one gather of dy serves both gradients
        torch.index_select(p.dy_TH, 0, token_of_row_N, out=out["drows"])
        torch.mul(out["drows"], p.rows_NH, out=by_row_NH)
        torch.sum(by_row_NH, 1, out=dots_N)
        flat_dprobs_N[slot_of_row_N] = dots_N.to(flat_dprobs_N.dtype)
        out["drows"].mul_(factor_N1)

    return {
        "permute": {
            "index_select": lambda: torch.index_select(p.x_TH, 0, token_of_row_N, out=out["rows"]),
            "gather": lambda: torch.gather(p.x_TH, 0, wide_token_of_row_NH, out=out["rows"]),
        },
        "unpermute": {
            "index_select + bmm": sum_by_bmm,
            "mul + index_add": sum_by_index_add,
            "mul + scatter_add": sum_by_scatter_add,
        },
        "permute backward": {
            "index_select + sum": plain_sum,
            "index_add": lambda: out["dx"].zero_().index_add_(0, token_of_row_N, p.drows_NH),
            "scatter_add": lambda: out["dx"].zero_().scatter_add_(0, wide_token_of_row_NH, p.drows_NH),
        },
        "unpermute backward": {
            "index_select, bmm": lambda: (drows_by_index_select(), dprobs_by_bmm()),
            "bmm, bmm": lambda: (drows_by_bmm(), dprobs_by_bmm()),
            "one gather, mul + sum": shared_gather,
        },
    }


def cast_compositions(
    problem: Problem, narrow_NH: torch.Tensor, wide_TH: torch.Tensor
) -> dict[str, dict[str, Callable[[], object]]]:
    """fp32 tokens to bf16 rows `narrow_NH`, and these summed into fp32 `wide_TH`: pass -> name -> function."""
    p = problem
    (tokens, k), hidden = p.ids_TK.shape, p.x_TH.shape[1]
    token_of_row_N = p.plan.slot_of_row_N.long() // k
    row_of_slot_N = p.plan.row_of_slot_TK.reshape(-1).long()
    narrow_TH, by_slot_NH, by_row_NH = p.x_TH.bfloat16(), torch.empty_like(narrow_NH), torch.empty_like(p.rows_NH)

    def cast_then_permute():
        narrow_TH.copy_(p.x_TH)
        torch.index_select(narrow_TH, 0, token_of_row_N, out=narrow_NH)

    def permute_then_cast():
        torch.index_select(p.x_TH, 0, token_of_row_N, out=by_row_NH)
        narrow_NH.copy_(by_row_NH)

    def sum_in_fp32():
        torch.index_select(narrow_NH, 0, row_of_slot_N, out=by_slot_NH)
        torch.sum(by_slot_NH.view(tokens, k, hidden), 1, dtype=torch.float32, out=wide_TH)

    def cast_then_add():
        by_row_NH.copy_(narrow_NH)
        wide_TH.zero_().index_add_(0, token_of_row_N, by_row_NH)

    return {
        "permute": {"cast, index_select": cast_then_permute, "index_select, cast": permute_then_cast},
        "unpermute": {"index_select, sum in fp32": sum_in_fp32, "cast, index_add": cast_then_add},
    }


def megatron_core_unfused(problem: Problem, num_experts: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Forward and backward from a routing mask `[T, E]` and dense probabilities, as its router hands them over."""
    p = problem
    tokens, hidden = p.x_TH.shape
    mask_TE = torch.zeros(tokens, num_experts, dtype=torch.bool).scatter_(1, p.ids_TK, True)
    dense_TE = torch.zeros(tokens, num_experts).scatter_(1, p.ids_TK, p.probs_TK).requires_grad_()
    x_TH = p.x_TH.detach().requires_grad_()

    def step():
        mask_ET = mask_TE.t().contiguous()
        order = torch.argsort(mask_ET.view(-1), descending=True, stable=True)[: p.ids_TK.numel()]
        token_of_row_N = order % tokens
        rows_NH = x_TH.index_select(0, token_of_row_N)
        factor_N = dense_TE.t().contiguous().masked_select(mask_ET)
        weighted_NH = rows_NH * factor_N[:, None].to(rows_NH.dtype)
        wide_NH = token_of_row_N[:, None].expand(-1, hidden)
        y_TH = torch.zeros_like(x_TH).scatter_add(0, wide_NH, weighted_NH)
        return torch.autograd.grad(y_TH, (x_TH, dense_TE), p.dy_TH)

    return step


def torchtitan(problem: Problem) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Forward and backward from ids and scores `[T, K]`: argsort of the slots, scores applied in fp32, scatter_add."""
    p = problem
    k, hidden = p.ids_TK.shape[1], p.x_TH.shape[1]
    x_TH, scores_TK = p.x_TH.detach().requires_grad_(), p.probs_TK.detach().requires_grad_()

    def step():
        order_N = torch.argsort(p.ids_TK.view(-1), stable=True)
        scores_N = scores_TK.view(-1)[order_N]
        wide_NH = (order_N // k)[:, None].expand(-1, hidden)
        rows_NH = torch.gather(x_TH, 0, wide_NH)
        weighted_NH = (rows_NH.float() * scores_N[:, None]).to(rows_NH.dtype)
        y_TH = torch.zeros_like(x_TH).scatter_add(0, wide_NH, weighted_NH)
        return torch.autograd.grad(y_TH, (x_TH, scores_TK), p.dy_TH)

    return step
