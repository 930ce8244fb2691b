"""The router of a mixture: α = top-k of softmax(θ_r · x), the others zero, not divided by their sum."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class MixseRouter(nn.Module):
    """One linear layer for all blocks. weight `[n, H]`, bias `[n]` or None; float32, as are logits and α."""

    def __init__(self, hidden: int, experts: int, *, top_k: int, bias: bool, device: torch.device | str):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.zeros(experts, hidden, device=device))
        self.bias = nn.Parameter(torch.zeros(experts, device=device)) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden `[..., H]`, any dtype -> α `[..., n]`, float32."""
        bias = None if self.bias is None else self.bias.float()
        return keep_top(F.linear(hidden.float(), self.weight.float(), bias).softmax(dim=-1), self.top_k)


def keep_top(probabilities: torch.Tensor, k: int) -> torch.Tensor:
    """`[..., n]`: the k largest as they are, zero for the others. Never more than k, also where some are equal."""
    if k == probabilities.shape[-1]:
        return probabilities
    largest, ids = probabilities.topk(k, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, ids, largest)


def initial_router(hidden: int, experts: int, *, bias: bool, seed: int) -> dict[str, torch.Tensor]:
    """Weight (and a zero bias) of a new router: uniform within ±1/√H from `seed`, as torch draws linear layers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(experts, hidden).uniform_(-1, 1, generator=generator) / hidden**0.5
    return {"weight": weight, **({"bias": torch.zeros(experts)} if bias else {})}
