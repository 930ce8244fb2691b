"""A small MoE language model in two makes: with `MoEExperts` under an engine, and plain, for one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import contiguous
from tests.reference import plain_experts

VOCAB, HIDDEN, WIDTH, EXPERTS, TOP, LAYERS = 19, 8, 4, 6, 2, 2
SPEC = ExpertSpec(EXPERTS, HIDDEN, WIDTH, bias=True)
SHUNNED = 1e4  # a router logit this much lower keeps all tokens away


class PlainExperts(nn.Module):
    def __init__(self):
        super().__init__()
        for name, shape in SPEC.shapes().items():
            self.register_parameter(name, nn.Parameter(torch.zeros(EXPERTS, *shape)))

    def forward(self, hidden_TH, ids_TK, weights_TK):
        return plain_experts(hidden_TH, ids_TK, weights_TK, dict(self.named_parameters()))


class Layer(nn.Module):
    def __init__(self, experts: nn.Module, shunned: tuple[int, ...]):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.mixer = nn.Linear(HIDDEN, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts
        self.shunned = list(shunned)

    def forward(self, x_TH):
        x_TH = x_TH + torch.tanh(self.mixer(x_TH))
        y_TH = self.norm(x_TH)
        logits_TE = self.router(y_TH).float()
        if self.shunned:
            logits_TE = logits_TE - SHUNNED * F.one_hot(torch.tensor(self.shunned), EXPERTS).sum(0)
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(TOP)
        return x_TH + self.experts(y_TH, ids_TK, weights_TK.to(y_TH.dtype))


class Toy(nn.Module):
    def __init__(self, experts: list[nn.Module], shunned: tuple[int, ...] = (), tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer(module, shunned) for module in experts)
        self.head = nn.Linear(HIDDEN, VOCAB)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids_T):
        x_TH = self.embed(ids_T)
        for layer in self.layers:
            x_TH = layer(x_TH)
        return self.head(x_TH)


def full_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Name -> tensor of the plain model, experts stacked `[E, ...]`. Random biases: a zero has no relative error."""
    generator = torch.Generator().manual_seed(seed)
    model = Toy([PlainExperts() for _ in range(LAYERS)])
    return {
        name: torch.randn(parameter.shape, generator=generator) * 0.4 for name, parameter in model.named_parameters()
    }


def plain_model(weights: dict[str, torch.Tensor], *, shunned: tuple[int, ...] = (), tied: bool = False) -> Toy:
    model = Toy([PlainExperts() for _ in range(LAYERS)], shunned, tied)
    model.load_state_dict(weights | {"head.weight": weights["embed.weight" if tied else "head.weight"]})
    return model


def parallel_model(
    weights: dict[str, torch.Tensor],
    grid,
    trainable: list[list[int]],
    *,
    dense_trains: bool = True,
    shunned: tuple[int, ...] = (),
    tied: bool = False,
) -> Toy:
    """This rank's share of the model; `trainable[l]` are the expert ids of layer l that train."""
    experts = [MoEExperts(SPEC, contiguous(EXPERTS, ranks=grid.expert, trainable=ids), grid) for ids in trainable]
    model = Toy(experts, shunned, tied)
    fill(model, experts, weights, trains=lambda name: dense_trains)
    return model


@torch.no_grad()
def fill(
    model: nn.Module,
    experts: list[MoEExperts],
    weights: dict[str, torch.Tensor],
    *,
    trains: Callable[[str], bool],
) -> None:
    """Copy whole weights into the model, of each layer's experts those seated here; say which dense ones train."""
    for index, layer in enumerate(experts):
        for name, parameter, seat_ids in layer.expert_parameters():
            for seat, expert in enumerate(seat_ids):
                if expert is not None:
                    parameter[seat].copy_(weights[f"layers.{index}.experts.{name}"][expert])
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "is_expert"):
            parameter.copy_(weights[name])
            parameter.requires_grad_(trains(name))


def batches(
    steps: int, micro_batches: int, *, empty: tuple[int, ...] = (), seed: int = 1
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """[step][micro-batch] -> (ids_T, labels_T), −100 = no label. Lengths and label counts all differ.

    `empty`: micro-batches without a single token.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for step in range(steps):
        row = []
        for index in range(micro_batches):
            length = 0 if index in empty else 5 + (3 * index + step) % 7
            ids_T = torch.randint(VOCAB, (length,), generator=generator)
            labels_T = torch.randint(VOCAB, (length,), generator=generator)
            labels_T[: (index + step) % 4] = -100
            row.append((ids_T, labels_T))
        made.append(row)
    return made


def loss_sum(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_TV.float(), labels_T, ignore_index=-100, reduction="sum")


def label_count(row) -> int:
    return sum(int((labels_T != -100).sum()) for _, labels_T in row)
