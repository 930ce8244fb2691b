"""The shapes of the GPU suite, and the tensors of one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_dist.ops import RowPlan, row_plan


@dataclass(frozen=True)
class Case:
    """One MoE layer of a model under a number of tokens."""

    model: str
    tokens: int
    experts: int
    top_k: int
    hidden: int
    width: int

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def cost(self) -> int:
        """Multiplications of a forward: what the time of a layer goes with."""
        return self.rows * self.hidden * self.width * 3

    def __str__(self) -> str:
        return f"{self.model} T{self.tokens}"


# experts, chosen a token, hidden, expert width. A rank of DeepSeek-V3 under 8-way expert parallelism holds 32 of its
# 256 experts and, as all ranks send to it, computes as many rows as its own tokens have slots.
MODELS = {
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "DeepSeek-V2-Lite": (64, 6, 2048, 1408),
    "Mixtral-8x7B": (8, 2, 4096, 14336),
    "DeepSeek-V3, 32 of 256 experts": (32, 8, 7168, 2048),
}
TOKENS = (4096, 8192, 16384, 32768)
TINY_MODELS = {"tiny, few experts": (4, 2, 64, 48), "tiny, many experts": (16, 4, 64, 32)}
TINY_TOKENS = (64, 128)


def cases(device: torch.device) -> list[Case]:
    """Smallest first: what no time is left for are the largest."""
    on_gpu = device.type == "cuda"
    models, tokens = (MODELS, TOKENS) if on_gpu else (TINY_MODELS, TINY_TOKENS)
    found = [Case(name, count, *shape) for name, shape in models.items() for count in tokens]
    return sorted(found, key=lambda case: (case.tokens, case.cost))


@dataclass(frozen=True)
class Tensors:
    """Tokens, routing and the output's gradient of a case; bf16, probabilities in fp32."""

    case: Case
    x_TH: torch.Tensor
    dy_TH: torch.Tensor
    ids_TK: torch.Tensor
    probs_TK: torch.Tensor
    plan: RowPlan


def draw(case: Case, device: torch.device) -> Tensors:
    """Each token draws its experts at random: the loads are as uneven as chance makes them."""
    generator = torch.Generator(device).manual_seed(0)
    make = {"generator": generator, "device": device}
    x_TH = torch.randn(case.tokens, case.hidden, **make).to(torch.bfloat16)
    dy_TH = torch.randn(case.tokens, case.hidden, **make).to(torch.bfloat16)
    ids_TK = torch.rand(case.tokens, case.experts, **make).topk(case.top_k).indices
    probs_TK = torch.rand(case.tokens, case.top_k, **make).softmax(1)
    plan = row_plan(ids_TK, num_experts=case.experts, num_rows=case.rows)
    return Tensors(case, x_TH, dy_TH, ids_TK, probs_TK, plan)
