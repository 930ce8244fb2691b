"""Plain references and the yardstick: what the parallel and fused code is compared with."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64; where b is zero, ‖a‖ must be zero too (else infinity)."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    difference, size = (a.double() - b.double()).norm().item(), b.double().norm().item()
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def plain_experts(
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    weights: dict[str, torch.Tensor],
    activation=None,
) -> torch.Tensor:
    """Token after token, slot after slot: y_t = Σ_k w_tk · expert_{ids_tk}(x_t); negative ids are dropped slots.

    `weights`: gate_up_proj [E,2I,H], down_proj [E,H,I] and optionally their biases [E,2I], [E,H].
    """
    rows = []
    for x_H, ids_K, weights_K in zip(x_TH, ids_TK.tolist(), weights_TK, strict=True):
        y_H = torch.zeros_like(x_H)
        for expert, weight in zip(ids_K, weights_K, strict=True):
            if expert < 0:
                continue
            z_F = weights["gate_up_proj"][expert] @ x_H
            if "gate_up_proj_bias" in weights:
                z_F = z_F + weights["gate_up_proj_bias"][expert]
            if activation is None:
                gate_I, up_I = z_F.chunk(2)
                a_I = F.silu(gate_I) * up_I
            else:
                a_I = activation(z_F)
            out_H = weights["down_proj"][expert] @ a_I
            if "down_proj_bias" in weights:
                out_H = out_H + weights["down_proj_bias"][expert]
            y_H = y_H + weight * out_H
        rows.append(y_H)
    return torch.stack(rows) if rows else x_TH * 0 + 0 * weights_TK.sum() + 0 * sum(w.sum() for w in weights.values())
