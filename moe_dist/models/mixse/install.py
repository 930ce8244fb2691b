"""The surgery: linear layers of the decoder blocks get experts, and the model a router."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_dist.errors import UserError
from moe_dist.models.mixse.linear import MixseLinear
from moe_dist.models.mixse.mixing import Mixer
from moe_dist.models.mixse.router import MixseRouter
from moe_dist.models.mixse.spec import MixseSpec, read_spec

ROUTER = "mixse_router"  # its name in the model


def install(model: PreTrainedModel, device: torch.device | str) -> MixseSpec | None:
    """Make the stock `model` (usually on the meta device) a mixture, if its configuration says so; else change nothing.

    Experts and router are zero until `loading.read_experts` has filled them, on `device`, in the dtype of their layer
    (the router: float32).
    """
    spec = read_spec(model.config)
    if spec is None:
        return None
    decoder, blocks = decoder_blocks(model)
    count, hidden = len(spec.experts), model.config.get_text_config().hidden_size
    router = MixseRouter(hidden, count, top_k=spec.top_k, bias=spec.bias, device=device)
    mixer = Mixer(spec, router, decoder, blocks)
    for index, block in enumerate(blocks):
        layers = dict(linear_layers(block))
        for target in spec.targets:
            if not any(name.rpartition(".")[2] == target for name in layers):
                raise UserError(f"config.json, mixse: block {index} has no linear layer called {target}")
        for name, layer in layers.items():
            if name.rpartition(".")[2] in spec.targets:
                block.set_submodule(name, MixseLinear(layer, spec.ranks, mixer.mixes[index], device))
    model.add_module(ROUTER, router)
    model.mixse = mixer
    return spec


def decoder_blocks(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder blocks, and these; UserError for a model that is not built so."""
    decoder = model.get_decoder()
    blocks = getattr(decoder, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UserError(f"{type(model).__name__} has no list of decoder blocks, whose linear layers could be mixed")
    return decoder, blocks


def linear_layers(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(path in the block, layer) of every linear layer of a decoder block."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def mixse_layers(model: nn.Module) -> list[tuple[str, MixseLinear]]:
    """(path, layer) of every linear layer with experts, in order of depth."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MixseLinear)]
