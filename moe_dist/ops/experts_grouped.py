"""The products of a span of experts in one grouped kernel each: the back end of the grouped MLP on CUDA in bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from moe_dist.ops.experts_loop import (
    Activation,
    Span,
    activation_backward,
    prepare_backward,
    prepare_forward,
    scaled,
    wide_dots,
    wide_sum,
)
from moe_dist.ops.swiglu import swiglu, swiglu_backward, swiglu_forward


def forward(
    x_RH: torch.Tensor,
    span: Span,
    activation: Activation,
    *,
    keep_z: bool,
    out: torch.Tensor | None,
    factor_R: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `experts_loop.forward`."""
    if not len(x_RH):
        return prepare_forward(x_RH, span, keep_z=keep_z, out=out)
    z_RF = _linear(x_RH, span.w_in, span.b_in, span)
    if activation is swiglu:
        a_RI = swiglu_forward(z_RF, factor_R, out=x_RH.new_empty(len(x_RH), span.w_out.shape[2]))
    else:
        a_RI = scaled(activation(z_RF), factor_R)
    y_RH = _linear(a_RI, span.w_out, span.b_out, span, factor_R)
    return y_RH if out is None else out.copy_(y_RH), z_RF if keep_z else None


def backward(
    grad_RH: torch.Tensor,
    x_RH: torch.Tensor | None,
    z_RF: torch.Tensor | None,
    span: Span,
    activation: Activation,
    needs: Sequence[bool],
    *,
    out: torch.Tensor | None,
    factor_R: torch.Tensor | None = None,
    out_factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, Callable[[], list[torch.Tensor | None]]]:
    """As `experts_loop.backward`; the weights' gradients are computed when they are asked for."""
    if not len(grad_RH):
        grad_x_RH, *grads = prepare_backward(grad_RH, span, needs, out)
        return grad_x_RH, lambda: grads
    if z_RF is None:
        z_RF = _linear(x_RH, span.w_in, span.b_in, span)
    grad_a_RI = _linear(grad_RH, span.w_out.transpose(1, 2), None, span)
    if activation is swiglu:
        places = {"out": grad_a_RI, "out_grad": torch.empty_like(z_RF), "out_factor": out_factor}
        a_RI, grad_z_RF = swiglu_backward(grad_a_RI, z_RF, factor_R, **places)
    else:
        a_RI, grad_z_RF = activation_backward(activation, grad_a_RI, z_RF, factor_R, out_factor=out_factor)
    if out_factor is not None and span.b_out is not None:
        for seat, rows in span.seats():
            out_factor[rows] += wide_dots(grad_RH[rows], span.b_out[seat])
    grad_x_RH = None
    if needs[0]:
        grad_x_RH = _linear(grad_z_RF, span.w_in.transpose(1, 2), None, span)
        grad_x_RH = grad_x_RH if out is None else out.copy_(grad_x_RH)

    def weights() -> list[torch.Tensor | None]:
        return [
            _weight_grad(grad_z_RF, x_RH, span.w_in, span) if needs[1] else None,
            _weight_grad(grad_RH, a_RI, span.w_out, span) if needs[2] else None,
            _bias_grad(grad_z_RF, span.b_in, span) if needs[3] else None,
            _bias_grad(grad_RH, span.b_out, span, factor_R) if needs[4] else None,
        ]

    return grad_x_RH, weights


def _weight_grad(grad_RB: torch.Tensor, x_RA: torch.Tensor, w_SBA: torch.Tensor, span: Span) -> torch.Tensor:
    """grad[s]ᵀ · x[s] for each seat: the kernel gives zeros where a seat has no rows, and pad seats get them here."""
    held = F.grouped_mm(grad_RB.t(), x_RA, offs=_offsets(span, x_RA.device))
    pads = len(w_SBA) - len(span.counts)
    return F.pad(held, (0, 0, 0, 0, 0, pads)) if pads else held


def _bias_grad(
    grad_RB: torch.Tensor, b_SB: torch.Tensor, span: Span, factor_R: torch.Tensor | None = None
) -> torch.Tensor:
    grad_SB = torch.zeros_like(b_SB)
    for seat, rows in span.seats():
        grad_SB[seat] = wide_sum(grad_RB[rows], None if factor_R is None else factor_R[rows])
    return grad_SB


def _linear(
    x_RA: torch.Tensor,
    w_SBA: torch.Tensor,
    b_SB: torch.Tensor | None,
    span: Span,
    factor_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """x · w[s]ᵀ (+ b[s], times the row's factor) for the rows of each seat s."""
    held = len(span.counts)
    y_RB = F.grouped_mm(x_RA, w_SBA[:held].transpose(1, 2), offs=_offsets(span, x_RA.device))
    if b_SB is not None:
        bias_RB = b_SB[:held].repeat_interleave(span.counts_on(y_RB.device), dim=0, output_size=len(y_RB))
        y_RB += bias_RB if factor_R is None else bias_RB * factor_R[:, None]
    return y_RB


def _offsets(span: Span, device: torch.device) -> torch.Tensor:
    return span.counts_on(device).cumsum(0).to(torch.int32)
