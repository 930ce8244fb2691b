"""Comparing a model with our experts to the stock one, tensor by tensor and expert by expert."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from moe_dist.models import moe_layers
from moe_dist.models.families import our_name
from moe_dist.parallel.shard import shard_of


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖a−b‖/‖b‖ in float64; the plain norm where b is zero."""
    ours, theirs = ours.double(), theirs.double()
    scale = theirs.norm().item()
    return (ours - theirs).norm().item() / (scale or 1.0)


def pairs(ours: torch.nn.Module, stock: torch.nn.Module, *, grad: bool = False):
    """(name, our tensor, stock tensor) of every tensor of this rank: experts one by one in the stock layout, and this
    rank's part of what the tensor axis cuts.

    `grad`: the gradients of the parameters instead; a missing one is a tensor of zeros.
    """
    layers = moe_layers(ours)
    mine = ours.state_dict(keep_vars=True)
    theirs = stock.state_dict(keep_vars=True)
    stacked = {layer.origin.stock_name(name) for _, layer in layers for name, _, _ in layer.expert_parameters()}

    def value(tensor: torch.Tensor) -> torch.Tensor:
        if not grad:
            return tensor.detach()
        return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

    for name in theirs.keys() - stacked:
        if not grad or theirs[name].requires_grad:
            held = mine[our_name(name, [layer.origin for _, layer in layers])]
            shard = shard_of(held)
            yield name, value(held), value(theirs[name]) if shard is None else shard.cut(value(theirs[name]))
    for _, layer in layers:
        for parameter_name, parameter, seat_ids in layer.expert_parameters():
            name = layer.origin.stock_name(parameter_name)
            for seat, expert in enumerate(seat_ids):
                if expert is not None:
                    turned = layer.origin.turn(value(parameter)[seat])
                    yield f"{name}[{expert}]", turned, value(theirs[name])[expert]


def file_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Assert equal names, dtypes, shapes and bits."""
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name], tensor), name
