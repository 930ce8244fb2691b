"""The layer of a mixture: a linear layer and all its LoRA experts, h = θ0·x + Σ_i α_i · scale_i · B_i·A_i·x."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from moe_dist.ops.lora_mixture import lora_mixture


class Mix:
    """The mixture of the tokens that are passing through: what the linear layers of a block (or of all) share.

    weights_TN: α_i · scale_i of the N experts, float32; None switches them off.
    most: how many of a token's weights differ from zero, at most; None: any number.
    It is state of a pass, not of the model: a copy of the model starts without.
    """

    weights_TN: torch.Tensor | None = None
    most: int | None = None

    def __deepcopy__(self, memo) -> Mix:
        memo[id(self)] = copy = Mix()
        return copy


class MixseLinear(nn.Linear):
    """A linear layer that keeps its `weight` and `bias`, and holds its experts stacked: one below the other: A of
    all of them in `experts_a` `[R, in]`, B turned in `experts_b` `[R, out]`."""

    def __init__(self, base: nn.Linear, ranks: tuple[int, ...], mix: Mix, device: torch.device | str):
        nn.Module.__init__(self)  # nn.Linear's own would make another weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        rows, dtype = sum(ranks), base.weight.dtype
        self.experts_a = nn.Parameter(torch.zeros(rows, base.in_features, dtype=dtype, device=device))
        self.experts_b = nn.Parameter(torch.zeros(rows, base.out_features, dtype=dtype, device=device))
        self.ranks, self.mix = ranks, mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`; the leading dimensions hold the tokens of `mix`, in its order."""
        mix_TN = self.mix.weights_TN
        if mix_TN is None:
            return F.linear(x, self.weight, self.bias)
        x_TH = x.reshape(-1, self.in_features)
        tensors = (x_TH, self.weight, self.bias, self.experts_a, self.experts_b, mix_TN)
        y_TO = lora_mixture(*tensors, self.ranks, most=self.mix.most)
        return y_TO.view(*x.shape[:-1], self.out_features)
