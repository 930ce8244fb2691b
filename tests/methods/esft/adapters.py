"""Models whose selected experts have other weights than their base, as if trained, and comparisons of models."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_dist.models import load_model, moe_layers
from moe_dist.models.families import find_experts
from tests.models.tiny import batch


def experts_layers(model: torch.nn.Module) -> dict[int, str]:
    """{layer index: path of its experts}, of a stock model or one with ours."""
    paths = [name for name, _ in moe_layers(model)] or [name for name, _ in find_experts(model)]
    return {int(path.split(".layers.")[1].split(".")[0]): path for path in paths}


def trained(folder: Path, experts: dict[int, list[int]], *, seed: int = 1, grid=None):
    """The model in `folder`, only these experts trainable, and each of their weights changed."""
    layers = experts_layers(load_model(folder))
    model = load_model(folder, grid, trainable={layers[index]: ids for index, ids in experts.items()})
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "is_expert", False):
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            generator = torch.Generator().manual_seed(seed)
            span = model.get_submodule(name.rpartition(".")[0])
            for seat, expert in enumerate(span.seat_ids):
                if expert is not None:
                    generator.manual_seed(seed * 1000 + expert)
                    noise = torch.randn(parameter.shape[1:], generator=generator)
                    parameter.data[seat] += (0.2 * noise).to(parameter.dtype)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=batch()).logits


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
