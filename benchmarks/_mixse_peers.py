"""What mixse_layer compares: one problem, and the layers of others on the very same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.xlora.config import XLoraConfig
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import nn
from torch.nn import functional as F

from moe_dist.ops.lora_mixture import FORMS, choose, lora_mixture

# y_TO or None, x_TH, mix_TN -> the layer's output. A y that is given is the base layer's part, and may be changed.
Layer = Callable[[torch.Tensor | None, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    tokens: int
    experts: int
    rank: int
    hidden: int

    def __str__(self) -> str:
        return f"n{self.experts} r{self.rank} H{self.hidden}"


class Problem:
    """A square layer, its experts, and tokens that have one expert each, weighed as a router's softmax does."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        self.shape = shape
        rows = shape.experts * shape.rank
        self.ranks = (shape.rank,) * shape.experts
        self.x_TH = normal(shape.tokens, shape.hidden)
        self.grad_TH = normal(shape.tokens, shape.hidden)
        self.weight_HH = normal(shape.hidden, shape.hidden) * shape.hidden**-0.5
        self.a_RH = normal(rows, shape.hidden) * shape.hidden**-0.5
        self.b_RH = normal(rows, shape.hidden) * shape.rank**-0.5
        probabilities_TN = torch.randn(shape.tokens, shape.experts, generator=generator).softmax(dim=1)
        best_T1, ids_T1 = probabilities_TN.max(dim=1, keepdim=True)
        self.mix_TN = torch.zeros_like(probabilities_TN).scatter(1, ids_T1, 2.0 * best_T1)  # 2: alpha / r

    @property
    def form(self) -> str:
        return choose(self.x_TH, self.a_RH, self.b_RH, self.ranks, 1, trains=False)


def ours(p: Problem) -> Layer:
    part = FORMS[p.form]

    def layer(y_TO, x_TH, mix_TN):
        if y_TO is None:
            return lora_mixture(x_TH, p.weight_HH, None, p.a_RH, p.b_RH, mix_TN, p.ranks, most=1)
        part.forward(x_TH, p.a_RH, p.b_RH, mix_TN, p.ranks, y_TO, keep=False)
        return y_TO

    return layer


def branches(p: Problem) -> Layer:
    """A branch an expert, summed: each of them for every token."""
    a_N, b_N = p.a_RH.split(p.ranks), [b.t().contiguous() for b in p.b_RH.split(p.ranks)]

    def layer(y_TO, x_TH, mix_TN):
        y_TO = F.linear(x_TH, p.weight_HH) if y_TO is None else y_TO
        weights_TN = mix_TN.to(y_TO.dtype)
        for expert, (a, b) in enumerate(zip(a_N, b_N, strict=True)):
            y_TO += F.linear(F.linear(x_TH, a) * weights_TN[:, expert, None], b)
        return y_TO

    return layer


def concatenated(p: Problem) -> Layer:
    """All A one below the other, all B side by side, in torch's own operations."""
    b_HR = p.b_RH.t().contiguous()

    def layer(y_TO, x_TH, mix_TN):
        y_TO = F.linear(x_TH, p.weight_HH) if y_TO is None else y_TO
        weights_TR = mix_TN.to(y_TO.dtype).repeat_interleave(p.shape.rank, dim=1)
        return y_TO.addmm_(F.linear(x_TH, p.a_RH) * weights_TR, b_HR.t())

    return layer


class _Given(nn.Module):
    """Stands for a base layer whose output is there."""

    output: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output


def xlora(p: Problem) -> Layer:
    """PEFT's X-LoRA layer around PEFT's LoRA layer, with the scalings given."""
    base = nn.Linear(p.shape.hidden, p.shape.hidden, bias=False, dtype=p.x_TH.dtype)
    base.weight = nn.Parameter(p.weight_HH, requires_grad=False)
    names = [str(expert) for expert in range(p.shape.experts)]
    config = LoraConfig(r=p.shape.rank, lora_alpha=p.shape.rank)
    target = lora.Linear(base, names[0], config=config, r=p.shape.rank, lora_alpha=p.shape.rank)
    for name in names[1:]:
        target.update_layer(name, r=p.shape.rank, lora_alpha=p.shape.rank, config=config)
    target.set_adapter(names)
    experts = zip(names, p.a_RH.split(p.ranks), p.b_RH.split(p.ranks), strict=True)
    for name, a, b in experts:
        target.lora_A[name].weight = nn.Parameter(a, requires_grad=False)
        target.lora_B[name].weight = nn.Parameter(b.t().contiguous(), requires_grad=False)

    class Switch:
        disabled = False

    settings = XLoraConfig(hidden_size=p.shape.hidden, adapters={}, top_k_lora=1)
    layer_of_peft = XLoraLinearLayer(Switch(), target, target.forward, 0, settings)
    given = _Given()

    def layer(y_TO, x_TH, mix_TN):
        given.output = None if y_TO is None else y_TO[None]
        target.base_layer = base if y_TO is None else given
        return layer_of_peft.forward(x_TH[None], scalings=mix_TN.to(x_TH.dtype)[None, :, None])[0]

    return layer


PEERS = {"LoRA branches summed": branches, "plain concatenated form": concatenated, "X-LoRA in PEFT": xlora}
