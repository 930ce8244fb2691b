"""Routers that are arms of the experiment on Nexus' quality, and nothing that the product has.

    mlp        logits = V2 · SwiGLU(V1 · x), with as many parameters as the projection P_r (up to rounding)
    cosine     logits = τ · cos(x, w_i), τ the mean length of the rows, which begin at length 8
    residual   logits = τ · cos(x − μ, d_i + P_r(d_i)): the prototype router before it was made linear in x

`cosine` and `residual` have the tensors of `linear` and `prototype`, whose files and whose extension they go through.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from moe_dist.models.nexus.router_nexus import TEMPERATURE, LinearRouter, NexusRouter, PaperRouter, PrototypeRouter


class MlpRouter(NexusRouter):
    """A router that looks at tokens alone, through as many weights as P_r has for embeddings of H dimensions."""

    def __init__(self, config):
        super().__init__(config)
        hidden = config.hidden_size
        self.input_dim = hidden
        width = round(3 * hidden * hidden / (2 * hidden + config.num_experts))
        self.hidden_dim = width  # of what the rows are multiplied with
        self.v1 = nn.Parameter(config.initializer_range * torch.randn(2 * width, hidden))
        self.v2 = nn.Parameter(config.initializer_range * torch.randn(config.num_experts, width))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate_TK, up_TK = F.linear(hidden_states.reshape(-1, self.input_dim), self.v1).chunk(2, dim=-1)
        return super().forward(F.silu(gate_TK) * up_TK)

    def fold(self) -> torch.Tensor:
        return self.v2


class CosineRouter(LinearRouter):
    def fold(self) -> torch.Tensor:
        return self.weight.norm(dim=1).mean() * F.normalize(self.weight, dim=1)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return super().forward(F.normalize(hidden_states, dim=-1))


class ResidualRouter(PrototypeRouter):
    def row(self, d_M: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return self.temperature * F.normalize(d_M + PaperRouter.row(self, d_M, w1, w2), dim=0)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return super().forward(F.normalize(hidden_states - self.input_mean, dim=-1))


KINDS = {"mlp": MlpRouter, "cosine": CosineRouter, "residual": ResidualRouter}


@torch.no_grad()
def put_routers(model: nn.Module, arm: str, *, fresh: bool) -> None:
    """Give every block of a Nexus model the router of an arm. fresh: just upcycled, not yet trained."""
    for layer in model.model.layers:
        gate = layer.mlp.gate
        if arm in KINDS:
            layer.mlp.gate = KINDS[arm](model.config).train(gate.training)
            if arm != "mlp":
                layer.mlp.gate.load_state_dict(gate.state_dict())
        if fresh and arm == "cosine":
            layer.mlp.gate.weight.copy_(TEMPERATURE * F.normalize(gate.weight, dim=1))
        if fresh and arm == "no_projection":  # no gradient reaches either of two factors that are both zero
            gate.w1.zero_()
            gate.w2.zero_()
