"""Export: the model on all ranks becomes one plain Hugging Face folder, equal to the bit.

Every expert is written once, by the rank that owns it; dense tensors by rank 0. Tensors go to disk one at a time. The
folder is built under a temporary name and renamed when it is complete, so a folder under its final name is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
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
from moe_dist.models.surgery import moe_layers
from moe_dist.models.together import Together
from moe_dist.parallel.grid import Grid

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
    full_tensor: parameter -> its whole tensor on this rank, for an engine that partitions parameters; all ranks call
    it for the same parameters in the same order, one at a time. Biases and everything else keep their dtype.
    grid: of a dense model, which has no layer of ours that knows it.
    shard_bytes: weights beyond this size go to several files.
    Raises UserError on every rank where any rank fails to write; then nothing is left under `folder`.
    """
    layers = moe_layers(model)
    if not layers and grid is None:
        raise UserError("export_model expects a model from load_model or init_model; this one has no MoE layer of ours")
    grid = layers[0][1].grid if layers else grid
    folder = Path(folder)
    partial = folder.parent / f".{folder.name}.partial"
    skeleton, plan = _plan(model)
    shards = ShardSet(partial, _entries(model, skeleton, plan), shard_bytes=shard_bytes)

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


def _plan(model: PreTrainedModel) -> tuple[PreTrainedModel, WritePlan]:
    """The stock model that `model` stands for, without weights, and how its tensors go to disk."""
    skeleton = build_skeleton(deepcopy(model.config), model.dtype, type(model))
    descriptions = [layer.origin for _, layer in moe_layers(model)]
    ours = model.state_dict(keep_vars=True)
    counts = expert_counts(descriptions)
    names, seen = [], {}
    tied = model.all_tied_weights_keys
    ignored = set(model._keys_to_ignore_on_save or ())
    # Of several names of one tensor, the one that the others are tied to is kept.
    for name in sorted(skeleton.state_dict().keys() - ignored, key=lambda name: (name in tied, name)):
        stacked = name in counts
        if stacked or seen.setdefault(id(ours[our_name(name, descriptions)]), name) == name:
            names.append(name)
    transforms = getattr(model, "_weight_conversions", None)
    return skeleton, plan_writing(skeleton, names, counts, transforms)


def _entries(model: PreTrainedModel, skeleton: PreTrainedModel, plan: WritePlan) -> dict[str, Entry]:
    """Every tensor on disk, in order: the dense ones, then layer by layer the experts."""
    layers = moe_layers(model)
    descriptions = [layer.origin for _, layer in layers]
    ours = model.state_dict(keep_vars=True)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    entries = {}
    for group in plan.dense:
        metas = {
            name: torch.empty(shapes[name], dtype=ours[our_name(name, descriptions)].dtype, device="meta")
            for name in group.names()
        }
        for key, tensor in plan.convert(group, metas, skeleton).items():
            entries[key] = Entry(tuple(tensor.shape), tensor.dtype)
    for _, layer in layers:
        for parameter_name, parameter, _ in layer.expert_parameters():
            layout = plan.experts[layer.origin.stock_name(parameter_name)]
            for key, shape in layout.disk_shapes(layer.origin.stock_shape(parameter_name)).items():
                entries[key] = Entry(shape, parameter.dtype)
    return entries


def _pieces(
    model: PreTrainedModel, skeleton: PreTrainedModel, plan: WritePlan, grid: Grid, full_tensor: FullTensor
) -> Iterator[list[tuple[str, torch.Tensor, int | None]]]:
    """(key, tensor, row) of what this rank writes, one source tensor at a time; all ranks step together."""
    layers = moe_layers(model)
    descriptions = [layer.origin for _, layer in layers]
    ours = model.state_dict(keep_vars=True)

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        made = full_tensor(tensor) if isinstance(tensor, nn.Parameter) else tensor
        return made.detach()

    for group in plan.dense:
        tensors = {name: whole(ours[our_name(name, descriptions)]) for name in group.names()}
        if grid.rank == 0:
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
