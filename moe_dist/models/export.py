"""Export: the model on all ranks becomes one plain Hugging Face folder, equal to the bit.

Every expert is written once, by the rank that owns it; dense tensors by the first rank of the pipeline stage that has
them, whole: what is cut over the tensor axis is put together, one tensor at a time. The folder is built under a
temporary name and renamed when it is complete, so a folder under its final name is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_dist.data.atomic import sync_folder
from moe_dist.data.made import note_folder
from moe_dist.errors import UserError
from moe_dist.models.conversion import WritePlan, plan_writing
from moe_dist.models.families import expert_counts, our_name
from moe_dist.models.mixse.exporting import collect, write_experts
from moe_dist.models.shards import SHARD_BYTES, Entry, ShardSet
from moe_dist.models.skeleton import build_skeleton
from moe_dist.models.surgery import moe_layers, swap
from moe_dist.models.together import Together
from moe_dist.parallel.collectives import gather
from moe_dist.parallel.grid import Grid
from moe_dist.parallel.shard import shard_of

FullTensor = Callable[[nn.Parameter], torch.Tensor]

# What a tokenizer or processor keeps beside the weights; copied unread from the folder that the model came from.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def export_model(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    full_tensor: FullTensor | None = None,
    grid: Grid | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `model` (from `load_model` or `init_model`) as a folder that plain transformers loads. Collective.

    folder: new, or an existing empty one, on a file system that all ranks see. Weights under their names on the hub,
    config, generation config, and the tokenizer: the one given, else the files beside the weights that were loaded.
    full_tensor: parameter -> its tensor on this rank (a part where the tensor axis cuts it), for an engine that
    partitions parameters; the ranks of a stage call it for the same parameters in the same order, one at a time. Biases
    and everything else keep their dtype.
    grid: where there may be no layer of ours that knows it, in a dense model or in a pipeline stage.
    shard_bytes: weights beyond this size go to several files.
    Raises UserError on every rank where any rank fails to write; then nothing is left under `folder`.
    """
    layers = moe_layers(model)
    if not layers and grid is None:
        raise UserError("export_model expects a model from load_model or init_model; this one has no MoE layer of ours")
    grid = layers[0][1].grid if layers else grid
    folder = Path(folder)
    partial = folder.parent / f".{folder.name}.partial"
    whole = model if grid.pipeline == 1 else _whole(model, grid)
    skeleton, plan = _plan(model, whole)
    shards = ShardSet(partial, _entries(whole, _dtypes(model, grid), skeleton, plan), shard_bytes=shard_bytes)

    together = Together(grid, "export")
    try:
        together.run(lambda: _prepare(folder, partial, shards), only=grid.rank == 0)
        for pieces in _pieces(model, skeleton, plan, grid, full_tensor or (lambda parameter: parameter)):
            together.attempt(lambda pieces=pieces: [shards.write(*piece, row=row) for *piece, row in pieces])
        together.run(shards.close)
        if hasattr(model, "mixse"):
            tensors = collect(model, full_tensor or (lambda parameter: parameter), keep=grid.rank == 0)
            together.run(lambda: write_experts(model, tensors, partial), only=grid.rank == 0)
        together.run(lambda: _finish(model, folder, partial, tokenizer), only=grid.rank == 0)
    except UserError:
        if grid.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _whole(model: PreTrainedModel, grid: Grid) -> PreTrainedModel:
    """The model with the layers of all stages, on the meta device."""
    whole = build_skeleton(deepcopy(model.config), model.dtype, type(model))
    whole.tie_weights(recompute_mapping=False)
    swap(whole, grid, device="meta", dense=True)
    return whole


def _dtypes(model: PreTrainedModel, grid: Grid) -> dict[str, torch.dtype]:
    """Of every tensor of all stages; an expert tensor is called by its layer, as in a checkpoint. Collective."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for path, layer in moe_layers(model):
        dtypes |= {f"{path}.{name}": parameter.dtype for name, parameter, _ in layer.expert_parameters()}
    if grid.pipeline == 1:
        return dtypes
    stages: list[dict[str, torch.dtype]] = [{}] * grid.world
    dist.all_gather_object(stages, dtypes)
    return {name: dtype for stage in stages for name, dtype in stage.items()}


def _plan(model: PreTrainedModel, whole: PreTrainedModel) -> tuple[PreTrainedModel, WritePlan]:
    """The stock model that `whole` stands for, without weights, and how its tensors go to disk."""
    skeleton = build_skeleton(deepcopy(model.config), model.dtype, type(model))
    descriptions = [layer.origin for _, layer in moe_layers(whole)]
    ours = whole.state_dict(keep_vars=True)
    counts = expert_counts(descriptions)
    names, seen = [], {}
    tied = whole.all_tied_weights_keys
    ignored = set(model._keys_to_ignore_on_save or ())
    # Of several names of one tensor, the one that the others are tied to is kept.
    for name in sorted(skeleton.state_dict().keys() - ignored, key=lambda name: (name in tied, name)):
        stacked = name in counts
        if stacked or seen.setdefault(id(ours[our_name(name, descriptions)]), name) == name:
            names.append(name)
    transforms = getattr(model, "_weight_conversions", None)
    return skeleton, plan_writing(skeleton, names, counts, transforms)


def _entries(
    whole: PreTrainedModel, dtypes: dict[str, torch.dtype], skeleton: PreTrainedModel, plan: WritePlan
) -> dict[str, Entry]:
    """Every tensor on disk, in order: the dense ones, then layer by layer the experts."""
    layers = moe_layers(whole)
    descriptions = [layer.origin for _, layer in layers]
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    entries = {}
    for group in plan.dense:
        metas = {
            name: torch.empty(shapes[name], dtype=dtypes[our_name(name, descriptions)], device="meta")
            for name in group.names()
        }
        for key, tensor in plan.convert(group, metas, skeleton).items():
            entries[key] = Entry(tuple(tensor.shape), tensor.dtype)
    for path, layer in layers:
        for parameter_name, _, _ in layer.expert_parameters():
            layout = plan.experts[layer.origin.stock_name(parameter_name)]
            for key, shape in layout.disk_shapes(layer.origin.stock_shape(parameter_name)).items():
                entries[key] = Entry(shape, dtypes[f"{path}.{parameter_name}"])
    return entries


def _pieces(
    model: PreTrainedModel, skeleton: PreTrainedModel, plan: WritePlan, grid: Grid, full_tensor: FullTensor
) -> Iterator[list[tuple[str, torch.Tensor, int | None]]]:
    """(key, tensor, row) of what this rank writes, one source tensor at a time; all ranks of a stage step together."""
    layers = moe_layers(model)
    descriptions = [layer.origin for _, layer in layers]
    ours = model.state_dict(keep_vars=True)

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        made = (full_tensor(tensor) if isinstance(tensor, nn.Parameter) else tensor).detach()
        shard = shard_of(tensor)
        if shard is None:
            return made
        parts = gather(made, grid.tensor_group, what="export")
        return torch.cat(parts.unbind(), dim=shard.dim)

    for group in plan.dense:
        names = {name: our_name(name, descriptions) for name in group.names()}
        if not set(names.values()) <= ours.keys():
            continue  # another stage's
        tensors = {name: whole(ours[ours_name]) for name, ours_name in names.items()}
        if grid.stage_rank == 0:
            yield [(key, tensor, None) for key, tensor in plan.convert(group, tensors, skeleton).items()]
    for _, layer in layers:
        origin = layer.origin
        for parameter_name, parameter, seat_ids in layer.expert_parameters():
            layout = plan.experts[origin.stock_name(parameter_name)]
            stacked = whole(parameter)
            for seat, expert in enumerate(seat_ids):
                owned = expert is not None and layer.placement.owner[expert] == grid.expert_rank
                if owned and grid.expert_data_rank == 0:
                    parts = layout.split(origin.turn(stacked[seat]))
                    row = expert if layout.stacked else None
                    yield [(key, part, row) for key, part in zip(layout.keys[expert], parts, strict=True)]


def _prepare(folder: Path, partial: Path, shards: ShardSet) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} already exists and is not empty; export to a new folder or remove it first")
    if partial.exists():
        shutil.rmtree(partial)  # left by an export that was cut off
    partial.mkdir(parents=True)
    shards.create()


def _finish(model: PreTrainedModel, folder: Path, partial: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Everything but the weights, then the rename that makes the folder appear."""
    config = deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(partial)
    if model.can_generate():
        model.generation_config.to_json_file(partial / "generation_config.json")
    source = getattr(model, "source_folder", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    elif source is not None:
        for pattern in TOKENIZER_FILES:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, partial / file.name)
    sync_folder(partial)
    note_folder(partial, folder)
    os.rename(partial, folder)
    sync_folder(folder.parent)
