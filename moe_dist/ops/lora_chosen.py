"""A mixture of LoRA experts, each token's chosen ones alone (csrc/lora.h): a form of `lora_mixture`; no autograd here.

Between the products everything is float32. The cost does not depend on how many experts there are to choose from.
"""

from __future__ import annotations

import functools
import itertools

import torch

from moe_dist.ops import native


def serves(x_TH: torch.Tensor, a_RH: torch.Tensor, b_RO: torch.Tensor) -> bool:
    """Whether this form computes such a mixture: fp32 or bf16 alike, dense, on a CPU."""
    return (
        x_TH.device.type == "cpu"
        and x_TH.dtype in (torch.float32, torch.bfloat16)
        and x_TH.dtype == a_RH.dtype == b_RO.dtype
        and a_RH.is_contiguous()
        and b_RO.is_contiguous()
        and native.has_cpu()
    )


def forward(
    x_TH: torch.Tensor,
    a_RH: torch.Tensor,
    b_RO: torch.Tensor,
    mix_TN: torch.Tensor,
    ranks: tuple[int, ...],
    y_TO: torch.Tensor,
    *,
    keep: bool,
) -> torch.Tensor | None:
    """As `lora_concatenated.forward`; what is kept is float32, a row for each weight that is not zero."""
    mix_TN = mix_TN.float().contiguous()
    u = torch.ops.moe_dist.lora_forward(x_TH.contiguous(), a_RH, b_RO, mix_TN, _starts(ranks), y_TO)
    return u if keep else None


def backward(
    grad_TO: torch.Tensor,
    x_TH: torch.Tensor | None,
    a_RH: torch.Tensor,
    b_RO: torch.Tensor,
    mix_TN: torch.Tensor,
    ranks: tuple[int, ...],
    u: torch.Tensor | None,
    grad_x_TH: torch.Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
) -> list[torch.Tensor | None]:
    """As `lora_concatenated.backward`, for frozen experts."""
    assert not any(needs[:2]), "this form computes no gradients of experts"
    mix = needs[2]
    weights_TN = mix_TN.float().contiguous()
    grad_mix = torch.zeros_like(weights_TN) if mix else None
    torch.ops.moe_dist.lora_backward(grad_TO, a_RH, b_RO, weights_TN, _starts(ranks), u, grad_x_TH, grad_mix)
    return [None, None, grad_mix.to(mix_TN.dtype) if mix else None]


@functools.lru_cache
def _starts(ranks: tuple[int, ...]) -> torch.Tensor:
    """Where each expert's rows begin, and where the last one's end."""
    return torch.tensor(list(itertools.accumulate(ranks, initial=0)))
