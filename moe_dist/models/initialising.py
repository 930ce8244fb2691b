"""Initialising: random weights from an inline configuration, the same model at any expert-parallel size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_dist.errors import UserError
from moe_dist.models.families import describe_experts, unknown_family
from moe_dist.models.loading import DtypePlan, parse_dtype
from moe_dist.models.mixse.spec import read_spec
from moe_dist.models.skeleton import build_skeleton, make_config
from moe_dist.models.surgery import Seating, Trainable, swap
from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import Grid


def init_model(
    config: Mapping[str, object],
    grid: Grid | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    trainable: Trainable = None,
    placement: Seating = "contiguous",
    dense: bool = False,
) -> PreTrainedModel:
    """A randomly initialised model of the architecture `config`, such as {"model_type": "qwen3_moe", ...}.

    Each module is filled by its family's own rule from a generator of its own, seeded by `seed` and the module's path,
    so the values do not depend on the grid. A rank holds one layer's experts in full for a moment, then its share.
    Nothing is communicated. The other arguments and the errors are those of `load_model`.
    """
    grid = grid or Grid.single()
    dtype = parse_dtype(dtype)
    model = build_skeleton(make_config(dict(config), where="model configuration"), dtype)
    if read_spec(model.config) is not None:
        raise UserError("a mixture of LoRA experts is composed from trained ones; it has no random initialisation")
    descriptions = describe_experts(model)
    if not descriptions and not dense:
        raise unknown_family(model.config.model_type)
    stock = {description.name: model.get_submodule(description.name) for description in descriptions}
    layers = dict(swap(model, grid, trainable=trainable, placement=placement, dense=dense))
    # Some rules fill the experts when they come to the block around them: ours wait until that is done.
    for path, module in stock.items():
        model.set_submodule(path, module)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        _initialise(model, "", model, layers, DtypePlan(model, dtype), seed)
    model.tie_weights(recompute_mapping=False)
    return model.to(grid.device).eval()


def _initialise(
    module: nn.Module,
    path: str,
    owner: PreTrainedModel,
    layers: Mapping[str, MoEExperts],
    dtypes: DtypePlan,
    seed: int,
) -> None:
    """Children first, as transformers does it; `owner` is the nearest model around the module and knows the rules."""
    children = {f"{path}.{name}" if path else name: child for name, child in module.named_children()}
    for inner, child in children.items():
        _initialise(child, inner, child if isinstance(child, PreTrainedModel) else owner, layers, dtypes, seed)
    _materialise(module, path, dtypes)
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    owner._init_weights(module)
    for inner, child in children.items():
        if inner in layers:
            _take_seats(layers[inner], child)
            setattr(module, inner.rpartition(".")[2], layers[inner])


def _materialise(module: nn.Module, path: str, dtypes: DtypePlan) -> None:
    """Give the module's own tensors memory on the CPU, filled with zeros until its rule has run."""
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None or not tensor.is_meta:
                continue
            kept = dtypes.get(f"{path}.{name}", tensor.dtype) if tensor.is_floating_point() else tensor.dtype
            value = torch.zeros(tensor.shape, dtype=kept)
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[name] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value


def _take_seats(layer: MoEExperts, module: nn.Module) -> None:
    """Copy this rank's experts out of a stock experts module that holds all of them."""
    origin = layer.origin
    for parameter_name, parameter, seat_ids in layer.expert_parameters():
        stacked = getattr(module, origin.stock_names[parameter_name])
        if parameter.dtype != stacked.dtype:
            parameter.data = parameter.data.to(stacked.dtype)
        for seat, expert in enumerate(seat_ids):
            if expert is not None:
                parameter.data[seat].copy_(origin.turn(stacked[expert]))
