"""The passes of back ends that take all experts of a span in one product each, whichever product that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

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
from moe_dist.ops.memory import empty
from moe_dist.ops.swiglu import swiglu, swiglu_backward, swiglu_forward


class Products(Protocol):
    """The products of a span's seats. Rows `[R,B]` lie seat after seat; `lay` makes of them what products take."""

    def lay(self, x_RB: torch.Tensor) -> torch.Tensor: ...

    def linear(self, laid_x: torch.Tensor, w_SBA: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x · w[s]ᵀ for the rows of each seat s, `[R,B]`, in `out` if given."""
        ...

    def weight_grad(self, laid_grad: torch.Tensor, laid_x: torch.Tensor, w_SBA: torch.Tensor) -> torch.Tensor:
        """grad[s]ᵀ · x[s] `[S,B,A]`; exact zeros for the seats without rows."""
        ...


def forward(
    make: Callable[[Span, torch.Tensor], Products],
    x_RH: torch.Tensor,
    span: Span,
    activation: Activation,
    *,
    keep_z: bool,
    out: torch.Tensor | None,
    factor_R: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `experts_loop.forward`, with the products of `make(span, rows)`."""
    if not len(x_RH):
        return prepare_forward(x_RH, span, keep_z=keep_z, out=out)
    products = make(span, x_RH)
    z_RF = _with_bias(products.linear(products.lay(x_RH), span.w_in), span.b_in, span)
    if activation is swiglu:
        a_RI = swiglu_forward(z_RF, factor_R, out=empty(x_RH, len(x_RH), span.w_out.shape[2]))
    else:
        a_RI = scaled(activation(z_RF), factor_R)
    y_RH = _with_bias(products.linear(products.lay(a_RI), span.w_out, out), span.b_out, span, factor_R)
    return y_RH, z_RF if keep_z else None


def backward(
    make: Callable[[Span, torch.Tensor], Products],
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
    products = make(span, grad_RH)
    laid_x = products.lay(x_RH) if needs[1] or z_RF is None else None
    laid_grad = products.lay(grad_RH)
    if z_RF is None:
        z_RF = _with_bias(products.linear(laid_x, span.w_in), span.b_in, span)
    grad_a_RI = products.linear(laid_grad, span.w_out.transpose(1, 2))
    if activation is swiglu:
        places = {"out": grad_a_RI, "out_grad": empty(z_RF, *z_RF.shape), "out_factor": out_factor}
        a_RI, grad_z_RF = swiglu_backward(grad_a_RI, z_RF, factor_R, **places)
    else:
        a_RI, grad_z_RF = activation_backward(activation, grad_a_RI, z_RF, factor_R, out_factor=out_factor)
    if out_factor is not None and span.b_out is not None:
        for seat, rows in span.seats():
            out_factor[rows] += wide_dots(grad_RH[rows], span.b_out[seat])
    laid_grad_z = products.lay(grad_z_RF) if needs[0] or needs[1] else None
    grad_x_RH = products.linear(laid_grad_z, span.w_in.transpose(1, 2), out) if needs[0] else None

    def weights() -> list[torch.Tensor | None]:
        return [
            products.weight_grad(laid_grad_z, laid_x, span.w_in) if needs[1] else None,
            products.weight_grad(laid_grad, products.lay(a_RI), span.w_out) if needs[2] else None,
            _bias_grad(grad_z_RF, span.b_in, span) if needs[3] else None,
            _bias_grad(grad_RH, span.b_out, span, factor_R) if needs[4] else None,
        ]

    return grad_x_RH, weights


def _with_bias(
    y_RB: torch.Tensor, b_SB: torch.Tensor | None, span: Span, factor_R: torch.Tensor | None = None
) -> torch.Tensor:
    """y, to which each row's bias (times its factor) has been added."""
    if b_SB is None:
        return y_RB
    counts_S = span.counts_on(y_RB.device)
    bias_RB = b_SB[: len(counts_S)].repeat_interleave(counts_S, dim=0, output_size=len(y_RB))
    return y_RB.add_(bias_RB if factor_R is None else bias_RB * factor_R[:, None])


def _bias_grad(
    grad_RB: torch.Tensor, b_SB: torch.Tensor, span: Span, factor_R: torch.Tensor | None = None
) -> torch.Tensor:
    grad_SB = torch.zeros_like(b_SB)
    for seat, rows in span.seats():
        grad_SB[seat] = wide_sum(grad_RB[rows], None if factor_R is None else factor_R[rows])
    return grad_SB
