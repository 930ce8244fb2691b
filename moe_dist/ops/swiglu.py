"""SwiGLU, silu(gate) · up for z = [gate | up]: the formula, and its two passes without autograd.

The passes take preallocated outputs and run natively for fp32 and bf16 on a CPU: one reading of z, all arithmetic in
fp32, one rounding. Elsewhere they run in plain torch, in z's own dtype.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from moe_dist.ops import native

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def swiglu(z_RF: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, z `[R,2I]` -> a `[R,I]`, in plain torch: differentiable, and the reference of the passes."""
    gate_RI, up_RI = z_RF.chunk(2, dim=-1)
    return F.silu(gate_RI) * up_RI


def swiglu_forward(z_RF: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """`swiglu` into `out` `[R,I]`."""
    if _native(z_RF):
        torch.ops.moe_dist.swiglu(z_RF, out)
        return out
    gate_RI, up_RI = z_RF.chunk(2, dim=-1)
    return torch.mul(F.silu(gate_RI), up_RI, out=out)


def swiglu_backward(
    grad_RI: torch.Tensor, z_RF: torch.Tensor, *, out: torch.Tensor, out_grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation again into `out` `[R,I]` and the gradient of z into `out_grad` `[R,2I]`.

    With σ = sigmoid(gate): dup = grad · gate·σ, dgate = grad · up · σ·(1 + gate·(1 − σ)). `out` may be `grad_RI`.
    """
    if _native(z_RF):
        torch.ops.moe_dist.swiglu_backward(grad_RI, z_RF, out, out_grad)
        return out, out_grad
    gate_RI, up_RI = z_RF.chunk(2, dim=-1)
    dgate_RI, dup_RI = out_grad.chunk(2, dim=-1)
    silu_RI = F.silu(gate_RI)
    torch.mul(grad_RI, silu_RI, out=dup_RI)
    dgate_RI.copy_(torch.ops.aten.silu_backward(grad_RI * up_RI, gate_RI))
    return torch.mul(silu_RI, up_RI, out=out), out_grad


def _native(z_RF: torch.Tensor) -> bool:
    return z_RF.device.type == "cpu" and z_RF.dtype in _NATIVE_DTYPES and native.has_cpu()
