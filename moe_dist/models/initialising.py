"""Initialising: random weights from an inline configuration, the same model on any grid."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_dist.errors import UserError
from moe_dist.models.cut import swap_and_cut
from moe_dist.models.families import describe_experts, unknown_family
from moe_dist.models.loading import DtypePlan, parse_dtype
from moe_dist.models.mixse.spec import read_spec
from moe_dist.models.skeleton import build_skeleton, make_config
from moe_dist.models.surgery import Seating, Trainable
from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import Grid
from moe_dist.parallel.shard import Shard, cut_parameter, shard_of


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
    so the values do not depend on the grid. A rank holds one block in full for a moment, then its share. Nothing is
    communicated. The other arguments and the errors are those of `load_model`.
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
    embedding = model.get_input_embeddings()
    dtypes = DtypePlan(model, dtype)
    layers = dict(swap_and_cut(model, grid, trainable=trainable, placement=placement, dense=dense))
    # Some rules fill the experts when they come to the block around them: ours wait until that is done.
    for path in layers:
        model.set_submodule(path, stock[path])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        _initialise(model, "", model, layers, dtypes, seed)
        for name, source in getattr(model, "tied_copies", {}).items():
            _fill_copy(model, name, source, embedding, dtypes, seed)
    model.tie_weights(recompute_mapping=False)
    return model.to(grid.device).eval()


def _initialise(
    module: nn.Module,
    path: str,
    owner: PreTrainedModel,
    layers: Mapping[str, MoEExperts],
    dtypes: DtypePlan,
    seed: int,
) -> dict[str, Shard]:
    """Children first, as transformers does it; `owner` is the nearest model around the module and knows the rules.

    Returns how the module's parameters are to be cut, by name. They are whole until the rule of the module around it
    has run, too, and so are its experts: such a rule may fill them."""
    children = {f"{path}.{name}" if path else name: child for name, child in module.named_children()}
    shards = {}
    for inner, child in children.items():
        nearest = child if isinstance(child, PreTrainedModel) else owner
        shards[inner] = _initialise(child, inner, nearest, layers, dtypes, seed)
    mine = _materialise(module, path, dtypes)
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    owner._init_weights(module)
    for inner, child in children.items():
        for name, shard in shards[inner].items():
            setattr(child, name, cut_parameter(getattr(child, name), shard))
        if inner in layers:
            _take_seats(layers[inner], child)
            setattr(module, inner.rpartition(".")[2], layers[inner])
    return mine


def _fill_copy(
    model: PreTrainedModel, name: str, source: str, embedding: nn.Module, dtypes: DtypePlan, seed: int
) -> None:
    """Give the last stage's copy of a tied tensor the values that the first stage has: those of `embedding`, which was
    the whole model's, on the meta device."""
    path, _, child = source.rpartition(".")
    _initialise(embedding, path, model.base_model, {}, dtypes, seed)
    parent, _, last = name.rpartition(".")
    module, whole = model.get_submodule(parent), getattr(embedding, child)
    shard = shard_of(getattr(module, last))
    setattr(module, last, whole if shard is None else cut_parameter(whole, shard))


def _materialise(module: nn.Module, path: str, dtypes: DtypePlan) -> dict[str, Shard]:
    """Give the module's own tensors memory on the CPU, filled with zeros until its rule has run: whole, which is what
    the rule knows. Returns how to cut them then, by name."""
    shards = {}
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None or not tensor.is_meta:
                continue
            kept = dtypes.get(f"{path}.{name}", tensor.dtype) if tensor.is_floating_point() else tensor.dtype
            shard = shard_of(tensor)
            if shard is not None:
                shards[name] = shard
            shape = tensor.shape if shard is None else shard.whole_shape(tensor.shape)
            value = torch.zeros(shape, dtype=kept)
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[name] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
    return shards


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
