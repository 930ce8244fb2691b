"""permute and unpermute: tokens to expert-sorted rows and back, with autograd."""

import torch
from torch.autograd.function import once_differentiable

from moe_dist.ops import passes
from moe_dist.ops.plan import RowPlan, row_plan


def permute(
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    *,
    num_experts: int,
    num_rows: int | None = None,
    align: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, RowPlan]:
    """Copy each token to the rows of its experts, rows sorted by expert (stably) -> `(rows_NH, plan)`.

    x_TH: `[T, H]`, any floating dtype and strides. dtype: that of the rows, cast on the way; None: that of x.
    Differentiable in x: the gradients of a token's rows are summed in fp32 in the order of k. ids_TK, num_rows and
    align as in `row_plan`; pad rows are zeros.

    Raises ValueError as `row_plan` does, and where x and ids differ in tokens or device.
    """
    plan = row_plan(ids_TK, num_experts=num_experts, num_rows=num_rows, align=align)
    return permute_rows(x_TH, plan, dtype=dtype), plan


def permute_rows(x_TH: torch.Tensor, plan: RowPlan, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`permute` by a plan that is there already -> rows `[N, H]`."""
    _check(x_TH, "x", plan.row_of_slot_TK.shape[0], plan)
    return _Permute.apply(x_TH, plan, dtype)


def unpermute(
    rows_NH: torch.Tensor,
    plan: RowPlan,
    probs_TK: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sum the rows of each token, times its probabilities -> y `[T, H]` in `dtype` (None: that of the rows).

    rows_NH: `[N, H]`, any floating dtype and strides. probs_TK: `[T, K]`, any floating dtype; None: plain sum.
    y[t] = sum over k of probs[t, k] · rows[row of (t, k)], accumulated in the order of k in fp32 (float64 in
    float64). A token whose slots are all dropped gets zeros. Differentiable in rows and probs.

    Raises ValueError where the shapes or devices do not belong to the plan.
    """
    _check(rows_NH, "rows", plan.num_rows, plan)
    if probs_TK is not None and (probs_TK.shape != plan.row_of_slot_TK.shape or not probs_TK.is_floating_point()):
        raise ValueError(
            f"probs must be floating point {list(plan.row_of_slot_TK.shape)}, "
            f"got {probs_TK.dtype} {list(probs_TK.shape)}"
        )
    return _Unpermute.apply(rows_NH, probs_TK, plan, dtype)


def _check(tensor, name, length, plan):
    if tensor.dim() != 2 or tensor.shape[0] != length or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape [{length}, hidden] to fit its plan, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
    if tensor.device != plan.row_of_slot_TK.device:
        raise ValueError(f"{name} is on {tensor.device}, its plan on {plan.row_of_slot_TK.device}")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, plan, dtype):
        ctx.plan, ctx.dtype = plan, x_TH.dtype
        return passes.permute(x_TH, plan, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows_NH):
        return passes.unpermute(drows_NH, ctx.plan, dtype=ctx.dtype), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_NH, probs_TK, plan, dtype):
        ctx.plan, ctx.dtype = plan, rows_NH.dtype
        # Only the gradient of the probabilities needs the rows: a frozen router keeps nothing alive.
        ctx.save_for_backward(rows_NH if ctx.needs_input_grad[1] else None, probs_TK)
        return passes.unpermute(rows_NH, plan, probs_TK, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):
        rows_NH, probs_TK = ctx.saved_tensors
        drows_NH, dprobs_TK = passes.unpermute_backward(
            dy_TH, ctx.plan, probs_TK=probs_TK, rows_NH=rows_NH, dtype=ctx.dtype
        )
        return drows_NH, None if dprobs_TK is None else dprobs_TK.to(probs_TK.dtype), None, None
