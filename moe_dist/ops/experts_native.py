"""The products of a span of SwiGLU experts by the C++ back end (csrc/experts.h): threads shared out over experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moe_dist.ops import native
from moe_dist.ops.experts_loop import Activation, Span, prepare_backward, prepare_forward
from moe_dist.ops.swiglu import swiglu


def serves(rows: torch.Tensor, span: Span, activation: Activation) -> bool:
    """Whether this back end computes such a span: SwiGLU without biases, fp32 or bf16, dense, on a CPU."""
    return (
        rows.device.type == "cpu"
        and rows.dtype in (torch.float32, torch.bfloat16)
        and activation is swiglu
        and span.b_in is None
        and span.b_out is None
        and span.w_in.is_contiguous()
        and span.w_out.is_contiguous()
        and native.has_cpu()
    )


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
    out, z_RF = prepare_forward(x_RH, span, keep_z=keep_z, out=out)
    counts_S = span.counts_on(x_RH.device)
    torch.ops.moe_dist.experts_forward(x_RH, span.w_in, span.w_out, counts_S, factor_R, out, z_RF)
    return out, z_RF


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
    """As `experts_loop.backward`."""
    grad_x_RH, *grads = prepare_backward(grad_RH, span, needs, out)
    counts_S = span.counts_on(grad_RH.device)
    torch.ops.moe_dist.experts_backward(
        grad_RH, x_RH, z_RF, span.w_in, span.w_out, counts_S, factor_R, grad_x_RH, *grads[:2], out_factor
    )
    return grad_x_RH, lambda: grads
