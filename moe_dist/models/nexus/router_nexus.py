"""Routers of Nexus models. Every variant is linear in the token: logits = x · e_i, with one row e_i an expert.

    linear     e_i is a weight of its own
    paper      e_i = P_r(d_i) = W2 · SwiGLU(W1 · d_i)          (arXiv 2408.15901, section 2.2; W1 [2H,m], W2 [H,H])
    prototype  e_i = (τ/c) · unit((d_i + P_r(d_i)) made orthogonal to μ)

d_i is the fixed embedding of expert i's domain, so that a new expert needs no new router weight: its row is the
projection of its embedding. `prototype` is ours. There d_i is the mean of the router's inputs over the domain's
documents, minus their mean μ over all of them, P_r moves it, c is the mean length of the router's inputs, and τ is
learned: logits are τ times a cosine, up to a shift that a softmax does not see. A new expert gets tokens from the first
step on, because its row is as long as the others and points at its own text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

TEMPERATURE = 8.0  # τ at the start
_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class NexusRouter(nn.Module, ABC):
    """Softmax over all experts, the best K, their raw probabilities (divided by their sum with `norm_topk_prob`).

    Logits are computed in float32 (or wider) whatever the model's dtype. At inference the rows e_i are kept until a
    weight may have changed: after an optimizer step, a write in place, a move, or any stretch of training.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self._kept: tuple | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden `[...,H]` -> logits `[T,E]`, weights `[T,K]` (both float32 or wider), ids `[T,K]`."""
        x_TH = hidden_states.reshape(-1, self.hidden_dim)
        rows_EH = self.rows()
        logits_TE = F.linear(x_TH.to(torch.promote_types(x_TH.dtype, rows_EH.dtype)), rows_EH)
        weights_TK, ids_TK = torch.topk(logits_TE.softmax(-1), self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK, ids_TK

    def rows(self) -> torch.Tensor:
        """The rows e_i `[E,H]`, float32 or wider: the weight of the plain linear router that this one is equal to."""
        if self.training or torch.is_grad_enabled():
            self._kept = None
            return self.fold()
        tensors = [*self.parameters(), *self.buffers()]
        if any(tensor.is_inference() for tensor in tensors):
            return self.fold()  # such tensors do not say when they are written to
        state = (_optimizer_steps, *((tensor.data_ptr(), tensor._version) for tensor in tensors))
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self.fold())
        return self._kept[1]

    @abstractmethod
    def fold(self) -> torch.Tensor:
        """Compute the rows."""

    def train(self, mode: bool = True) -> NexusRouter:
        self._kept = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> NexusRouter:
        self._kept = None
        return super()._apply(fn, recurse)

    def wide(self, tensor: torch.Tensor) -> torch.Tensor:
        """In float32, or in its own dtype where that is wider."""
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class LinearRouter(NexusRouter):
    """A row a weight: what mixtures of experts usually have, and the baseline."""

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))

    def fold(self) -> torch.Tensor:
        return self.wide(self.weight)


class PaperRouter(NexusRouter):
    """e_i = W2 · SwiGLU(W1 · d_i), no biases. The number of parameters, 2H·m + H·H, does not depend on the experts.

    Rows of the experts in `renormalised` are stretched to the mean length of the others: a projection that was fitted
    without a domain makes its row short, and an expert with a short row gets no tokens.
    """

    def __init__(self, config):
        super().__init__(config)
        hidden, dim = config.hidden_size, config.domain_dim or config.hidden_size
        self.w1 = nn.Parameter(torch.zeros(2 * hidden, dim))
        self.w2 = nn.Parameter(torch.zeros(hidden, hidden))
        self.register_buffer("domain_embeddings", torch.zeros(config.num_experts, dim))
        self.renormalised = tuple(config.renormalised)

    def fold(self) -> torch.Tensor:
        w1, w2 = self.wide(self.w1), self.wide(self.w2)
        # One domain after the other: a matrix product over all of them may round otherwise when one is added, and a
        # row must not depend on which other experts there are.
        rows = [self.row(d_M.to(w1.dtype), w1, w2) for d_M in self.domain_embeddings]
        if self.renormalised:
            kept = [row_H for expert, row_H in enumerate(rows) if expert not in self.renormalised]
            length = torch.stack(kept).norm(dim=1).mean()
            for expert in self.renormalised:
                rows[expert] = length * F.normalize(rows[expert], dim=0)
        return torch.stack(rows)

    def row(self, d_M: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        gate_H, up_H = torch.mv(w1, d_M).chunk(2)
        return torch.mv(w2, F.silu(gate_H) * up_H)


class PrototypeRouter(PaperRouter):
    """e_i = (τ/c) · unit of (d_i + P_r(d_i)) without its part along μ.

    Buffers `input_mean` μ `[H]` and `input_length` c `[1]` are statistics of the seed model's router inputs, fixed;
    `temperature` τ `[1]` is learned.
    """

    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.full((1,), TEMPERATURE))
        self.register_buffer("input_mean", torch.zeros(config.hidden_size))
        self.register_buffer("input_length", torch.ones(1))

    def row(self, d_M: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        mean_H = self.input_mean.to(d_M.dtype)
        moved_H = d_M + super().row(d_M, w1, w2)
        # Where μ is zero there is nothing to take away: the clamped divisor leaves an exact zero.
        share = torch.dot(moved_H, mean_H) / torch.dot(mean_H, mean_H).clamp(min=torch.finfo(d_M.dtype).tiny)
        unit_H = F.normalize(moved_H - share * mean_H, dim=0)
        return self.wide(self.temperature) / self.input_length.to(d_M.dtype) * unit_H


KINDS = {"linear": LinearRouter, "paper": PaperRouter, "prototype": PrototypeRouter}
