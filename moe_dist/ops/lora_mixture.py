"""A linear layer and a mixture of its LoRA experts in one (the layer of MiXSE, arXiv 2406.12034):

    y = W·x + bias + Σ_i mix_i · B_i·A_i·x

The experts lie stacked, A of all of them one below the other, B side by side: two dense products compute them all, and
between the two the columns of an expert are multiplied by its weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from moe_dist.ops.memory import empty


def lora_mixture(
    x_TH: torch.Tensor,
    weight_OH: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RH: torch.Tensor,
    b_OR: torch.Tensor,
    mix_TN: torch.Tensor,
    ranks: Sequence[int],
) -> torch.Tensor:
    """The layer's output `[T,O]` in the dtype of x.

    a_RH, b_OR: the stacked experts, R = sum of `ranks`, the rows of each of the N experts; in the dtype of x.
    mix_TN: an expert's weight for a token, its LoRA scale included; float32, or the dtype of x.

    Differentiable in all tensors; what does not require grad costs nothing, and frozen experts keep no input for the
    backward. With B zero it is the base layer's output to the bit.
    """
    assert len(ranks) == mix_TN.shape[1], "as many ranks as experts"
    assert sum(ranks) == len(a_RH) == b_OR.shape[1], "as many rows of A and columns of B as the ranks say"
    tensors = (x_TH, weight_OH, bias_O, a_RH, b_OR, mix_TN)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _LoraMixture.apply(*tensors, ranks)
    return _forward(*tensors, ranks)[0]


def reference(x_TH, weight_OH, bias_O, a_RH, b_OR, mix_TN, ranks):
    """The formula, expert after expert, in plain torch: what `lora_mixture` is compared with."""
    y_TO = F.linear(x_TH, weight_OH, bias_O)
    for a_rH, b_Or, mix_T in zip(a_RH.split(ranks), b_OR.split(ranks, dim=1), mix_TN.unbind(1), strict=True):
        y_TO = y_TO + (mix_T[:, None] * F.linear(F.linear(x_TH, a_rH), b_Or)).to(y_TO.dtype)
    return y_TO


class _LoraMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weight_OH, bias_O, a_RH, b_OR, mix_TN, ranks):
        y_TO, u_TR = _forward(x_TH, weight_OH, bias_O, a_RH, b_OR, mix_TN, ranks, keep_u=any(ctx.needs_input_grad[4:6]))
        x, weight, _, a, b, mix = ctx.needs_input_grad[:6]
        ctx.save_for_backward(
            x_TH if weight or a else None,
            weight_OH if x else None,
            a_RH if x else None,
            b_OR if x or a or mix else None,
            mix_TN if x or a or b else None,
            u_TR,
        )
        ctx.ranks, ctx.mix_dtype = ranks, mix_TN.dtype
        return y_TO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TO):
        x_TH, weight_OH, a_RH, b_OR, mix_TN, u_TR = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_mix = ctx.needs_input_grad[:6]
        grad_x = grad_a = grad_b = grad_mix = None
        if needs_x or needs_a or needs_mix:
            grad_TR = torch.mm(grad_TO, b_OR)
            if needs_mix:
                grad_mix = _sum_of_each(u_TR * grad_TR.to(ctx.mix_dtype), ctx.ranks)
            if needs_x or needs_a:
                _weigh(grad_TR, mix_TN, ctx.ranks)
            if needs_a:
                grad_a = torch.mm(grad_TR.t(), x_TH)
            if needs_x:
                grad_x = torch.mm(grad_TO, weight_OH, out=empty(grad_TO, len(grad_TO), weight_OH.shape[1]))
                grad_x.addmm_(grad_TR, a_RH)
        if needs_b:
            grad_b = torch.mm(grad_TO.t(), _weigh(u_TR.clone(), mix_TN, ctx.ranks))
        grad_weight = torch.mm(grad_TO.t(), x_TH) if needs_weight else None
        grad_bias = grad_TO.sum(dim=0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_mix, None


def _forward(x_TH, weight_OH, bias_O, a_RH, b_OR, mix_TN, ranks, *, keep_u: bool = False):
    """(y `[T,O]`, A·x `[T,R]` if it is to be kept)."""
    y_TO = empty(x_TH, len(x_TH), len(weight_OH))
    if bias_O is None:
        torch.mm(x_TH, weight_OH.t(), out=y_TO)
    else:
        torch.addmm(bias_O, x_TH, weight_OH.t(), out=y_TO)
    u_TR = torch.mm(x_TH, a_RH.t())
    v_TR = _weigh(u_TR.clone() if keep_u else u_TR, mix_TN, ranks)
    y_TO.addmm_(v_TR, b_OR.t())
    return y_TO, u_TR if keep_u else None


def _weigh(u_TR: torch.Tensor, mix_TN: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """u with each expert's columns multiplied by its weight, in place."""
    if len(set(ranks)) == 1:
        u_TR.view(*mix_TN.shape, ranks[0]).mul_(mix_TN[:, :, None])
        return u_TR
    return u_TR.mul_(mix_TN.repeat_interleave(_tensor(ranks, mix_TN.device), dim=1, output_size=u_TR.shape[1]))


def _sum_of_each(u_TR: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """The sum `[T,N]` over each expert's columns."""
    if len(set(ranks)) == 1:
        return u_TR.view(len(u_TR), len(ranks), ranks[0]).sum(dim=2)
    owner_R = torch.arange(len(ranks), device=u_TR.device).repeat_interleave(_tensor(ranks, u_TR.device))
    return u_TR.new_zeros(len(u_TR), len(ranks)).index_add_(1, owner_R, u_TR)


def _tensor(ranks: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(ranks, device=device)
