"""The experts and the router of a MiXSE folder into an installed model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_dist.errors import UserError
from moe_dist.models.adapter import LoraAdapter, open_lora
from moe_dist.models.folder import open_file
from moe_dist.models.mixse.install import ROUTER, mixse_layers
from moe_dist.models.mixse.spec import KEY, MixseSpec

ROUTER_FILE = "router.safetensors"


@torch.no_grad()
def read_experts(model: PreTrainedModel, spec: MixseSpec, folder: Path) -> None:
    """Fill experts and router of `model`, which `install` has prepared, from the subfolder of `folder`.

    Experts take the dtype of their layer. UserError where the files are not those that `spec` promises.
    """
    layers = dict(mixse_layers(model))
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    for name, rows in spec.slices().items():
        adapter = open_lora(folder / KEY / name)
        adapter.check_shapes(shapes)
        _check_spec(name, adapter, spec)
        with adapter.files:
            for target in adapter.targets:
                a, b = adapter.pair(target)
                layers[target].experts_a[rows].copy_(a)
                layers[target].experts_b[rows].copy_(b.t())
    _read_router(model.get_submodule(ROUTER), folder / KEY / ROUTER_FILE)


def _check_spec(name: str, adapter: LoraAdapter, spec: MixseSpec) -> None:
    place = spec.experts.index(name)
    promised = spec.ranks[place], spec.scales[place]
    if promised != (adapter.rank, adapter.scale):
        raise UserError(
            f"{adapter.folder} has rank {adapter.rank} and scale {adapter.scale}; config.json says {promised[0]} and "
            f"{promised[1]}: compose the folder anew"
        )


def _read_router(router: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing, but config.json says that this is a mixture of experts")
    files = open_file(path)
    wanted = {name: list(parameter.shape) for name, parameter in router.named_parameters()}
    found = {name: list(info.shape) for name, info in files.tensors.items()}
    if found != wanted:
        raise UserError(f"{path} holds {found}; this mixture's router is {wanted}")
    with files:
        for name, parameter in router.named_parameters():
            parameter.copy_(files.read(name))
