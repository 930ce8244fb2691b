"""The layer of a mixture: a linear layer and all its LoRA experts, h = θ0·x + Σ_i α_i · scale_i · B_i·A_i·x."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Mix:
    """The mixture of the tokens that are passing through: what the linear layers of a block (or of all) share.

    rows_TR: α_i · scale_i for each of the R rows of `experts_a`, float32; None switches the experts off.
    It is state of a pass, not of the model: a copy of the model starts without.
    """

    rows_TR: torch.Tensor | None = None

    def __deepcopy__(self, memo) -> Mix:
        memo[id(self)] = copy = Mix()
        return copy


class MixseLinear(nn.Linear):
    """A linear layer that keeps its `weight` and `bias`, and holds its experts stacked: A of all of them one below the
    other in `experts_a` `[R, in]`, B side by side in `experts_b` `[out, R]`."""

    def __init__(self, base: nn.Linear, rows: int, mix: Mix, device: torch.device | str):
        nn.Module.__init__(self)  # nn.Linear's own would make another weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        dtype = base.weight.dtype
        self.experts_a = nn.Parameter(torch.zeros(rows, base.in_features, dtype=dtype, device=device))
        self.experts_b = nn.Parameter(torch.zeros(base.out_features, rows, dtype=dtype, device=device))
        self.mix = mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`; the leading dimensions hold the tokens of `mix`, in its order."""
        y = F.linear(x, self.weight, self.bias)
        rows_TR = self.mix.rows_TR
        if rows_TR is None:
            return y
        z_TR = F.linear(x.reshape(-1, self.in_features), self.experts_a)
        z_TR = (z_TR * rows_TR).to(z_TR.dtype)
        return torch.addmm(y.view(-1, self.out_features), z_TR, self.experts_b.t()).view_as(y)
