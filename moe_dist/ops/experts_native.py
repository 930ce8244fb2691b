"""The products of a span of SwiGLU experts by the C++ back end (csrc/experts.h): threads shared out over experts."""

from __future__ import annotations

import torch

from moe_dist.ops import native
from moe_dist.ops.experts_loop import Activation, Span, zero_idle
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
    x_RH: torch.Tensor, span: Span, activation: Activation, out: torch.Tensor, out_z: torch.Tensor | None
) -> None:
    """y into `out` `[R,H]` and, where wanted, z into `out_z` `[R,F]`."""
    counts_S = torch.tensor(span.counts, dtype=torch.int64)
    torch.ops.moe_dist.experts_forward(x_RH, span.w_in, span.w_out, counts_S, out, out_z)


def backward(
    grad_RH: torch.Tensor,
    x_RH: torch.Tensor | None,
    z_RF: torch.Tensor | None,
    span: Span,
    activation: Activation,
    grad_x_RH: torch.Tensor | None,
    grads: list[torch.Tensor | None],
) -> None:
    """As `experts_loop.backward`."""
    counts_S = torch.tensor(span.counts, dtype=torch.int64)
    torch.ops.moe_dist.experts_backward(
        grad_RH, x_RH, z_RF, span.w_in, span.w_out, counts_S, grad_x_RH, grads[0], grads[1]
    )
    zero_idle(span, grads)
