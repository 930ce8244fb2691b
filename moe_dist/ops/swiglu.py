"""SwiGLU, silu(gate) · up for z = [gate | up]: the formula, and its two passes without autograd.

The passes take preallocated outputs and run natively for fp32 and bf16: one reading of z, all arithmetic in fp32, one
rounding. Elsewhere they run in plain torch, in fp32 or wider.
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


def swiglu_forward(z_RF: torch.Tensor, factor_R: torch.Tensor | None = None, *, out: torch.Tensor) -> torch.Tensor:
    """`swiglu` times each row's factor into `out` `[R,I]`. factor_R: fp32 `[R]`; None: ones."""
    if _native(z_RF):
        torch.ops.moe_dist.swiglu(z_RF, factor_R, out)
        return out
    gate_RI, up_RI = _wide(z_RF).chunk(2, dim=-1)
    if factor_R is None:
        return torch.mul(F.silu(gate_RI), up_RI, out=out)
    return torch.mul(F.silu(gate_RI) * up_RI, factor_R[:, None], out=out)


def swiglu_backward(
    grad_RI: torch.Tensor,
    z_RF: torch.Tensor,
    factor_R: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
    out_grad: torch.Tensor,
    out_factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the gradient of the result `[R,I]`: the result again into `out` `[R,I]`, the gradient of z into `out_grad`
    `[R,2I]`, that of the factor into `out_factor` (fp32 `[R]`), where it is given.

    With f the factor, σ = sigmoid(gate), g = grad: dup = f·g · gate·σ, dgate = f·g · up · σ·(1 + gate·(1 − σ)),
    df = <g, gate·σ·up>. `out` may be `grad_RI`.
    """
    if _native(z_RF):
        torch.ops.moe_dist.swiglu_backward(grad_RI, z_RF, factor_R, out, out_grad, out_factor)
        return out, out_grad
    gate_RI, up_RI = _wide(z_RF).chunk(2, dim=-1)
    dgate_RI, dup_RI = out_grad.chunk(2, dim=-1)
    wide_RI, silu_RI = _wide(grad_RI), F.silu(gate_RI)
    a_RI = silu_RI * up_RI
    if out_factor is not None:
        out_factor.copy_((wide_RI * a_RI).sum(1))
    if factor_R is not None:
        wide_RI = wide_RI * factor_R[:, None]
        a_RI *= factor_R[:, None]
    torch.mul(wide_RI, silu_RI, out=dup_RI)
    dgate_RI.copy_(torch.ops.aten.silu_backward(wide_RI * up_RI, gate_RI))
    return out.copy_(a_RI), out_grad


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _native(z_RF: torch.Tensor) -> bool:
    here = native.has_cuda() if z_RF.is_cuda else z_RF.device.type == "cpu" and native.has_cpu()
    return here and z_RF.dtype in _NATIVE_DTYPES
