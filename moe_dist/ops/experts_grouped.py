"""The products of a span of experts in one grouped kernel each: the back end of the grouped MLP on CUDA in bf16."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from moe_dist.ops.experts_loop import Activation, Span, activation_backward, wide_sum
from moe_dist.ops.swiglu import swiglu, swiglu_backward, swiglu_forward


def forward(
    x_RH: torch.Tensor, span: Span, activation: Activation, out: torch.Tensor, out_z: torch.Tensor | None
) -> None:
    """y into `out` `[R,H]` and, where wanted, z into `out_z` `[R,F]`."""
    if not len(x_RH):
        return
    z_RF = _linear(x_RH, span.w_in, span.b_in, span.counts)
    if out_z is not None:
        out_z.copy_(z_RF)
    if activation is swiglu:
        a_RI = swiglu_forward(z_RF, out=x_RH.new_empty(len(x_RH), span.w_out.shape[2]))
    else:
        a_RI = activation(z_RF)
    out.copy_(_linear(a_RI, span.w_out, span.b_out, span.counts))


def backward(
    grad_RH: torch.Tensor,
    x_RH: torch.Tensor | None,
    z_RF: torch.Tensor | None,
    span: Span,
    activation: Activation,
    grad_x_RH: torch.Tensor | None,
    grads: list[torch.Tensor | None],
) -> None:
    """The gradients of the rows and of w_in, w_out, b_in, b_out into the tensors given, each None where not needed."""
    if not len(grad_RH):
        for grad_S in grads:
            if grad_S is not None:
                grad_S.zero_()
        return
    if z_RF is None:
        z_RF = _linear(x_RH, span.w_in, span.b_in, span.counts)
    grad_a_RI = _linear(grad_RH, span.w_out.transpose(1, 2), None, span.counts)
    if activation is swiglu:
        a_RI, grad_z_RF = swiglu_backward(grad_a_RI, z_RF, out=grad_a_RI, out_grad=torch.empty_like(z_RF))
    else:
        a_RI, grad_z_RF = activation_backward(activation, grad_a_RI, z_RF)
    if grad_x_RH is not None:
        grad_x_RH.copy_(_linear(grad_z_RF, span.w_in.transpose(1, 2), None, span.counts))
    grad_w_in, grad_w_out, grad_b_in, grad_b_out = grads
    for grad_S, left, right in ((grad_w_in, grad_z_RF, x_RH), (grad_w_out, grad_RH, a_RI)):
        if grad_S is not None:
            held = len(span.counts)
            grad_S[:held].copy_(F.grouped_mm(left.t(), right, offs=_offsets(span.counts, left.device)))
            grad_S[held:].zero_()
    for grad_S, grad_RB in ((grad_b_in, grad_z_RF), (grad_b_out, grad_RH)):
        if grad_S is not None:
            grad_S.zero_()
            for seat, rows in span.seats():
                grad_S[seat] = wide_sum(grad_RB[rows])


def _linear(x_RA: torch.Tensor, w_SBA: torch.Tensor, b_SB: torch.Tensor | None, counts: list[int]) -> torch.Tensor:
    """x · w[s]ᵀ (+ b[s]) for the `counts[s]` rows of each seat s."""
    held = len(counts)
    y_RB = F.grouped_mm(x_RA, w_SBA[:held].transpose(1, 2), offs=_offsets(counts, x_RA.device))
    if b_SB is not None:
        counts_S = torch.tensor(counts, device=y_RB.device)
        y_RB += b_SB[:held].repeat_interleave(counts_S, dim=0, output_size=len(y_RB))
    return y_RB


def _offsets(counts: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).to(device=device, dtype=torch.int32)
