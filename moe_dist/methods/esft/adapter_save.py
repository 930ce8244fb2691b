"""Writing an adapter: from a model in memory, on all of its ranks, or from tensors that come one at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_dist import __version__
from moe_dist.config.expert_files import write_expert_config
from moe_dist.config.strict_json import write_json
from moe_dist.data.atomic import sync_folder
from moe_dist.data.made import note_folder
from moe_dist.errors import UserError
from moe_dist.methods.esft.adapter_folder import EXPERTS, FORMAT, MANIFEST, Base, find_base, weight_files
from moe_dist.methods.esft.adapter_names import AdapterNames, Contents, ExpertTensor
from moe_dist.models.export import TOKENIZER_FILES, FullTensor
from moe_dist.models.families import our_name
from moe_dist.models.folder import describe_file
from moe_dist.models.shards import SHARD_BYTES, Entry, ShardSet
from moe_dist.models.surgery import moe_layers
from moe_dist.models.together import Together
from moe_dist.parallel.grid import Grid
from moe_dist.train.trainable import layer_index

Piece = tuple[str, torch.Tensor]


def save_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    selection: Mapping[str, Any] | None = None,
    full_tensor: FullTensor | None = None,
) -> Path:
    """Write what trains in `model` (from `load_model`) as an adapter. Collective under a grid.

    folder: new or empty. Tensors keep the dtype that they have in the model. tokenizer: else the base model's files
    are taken. selection: how the experts were chosen, for the manifest. full_tensor: as in `export_model`.
    Raises UserError on every rank where any rank fails; then nothing is left under `folder`.
    """
    layers = moe_layers(model)
    if not layers:
        raise UserError("save_adapter expects a model from load_model: this one has no experts of ours")
    return write_model(
        model,
        Path(folder),
        AdapterNames.of(model),
        {str(layer_index(name)): sorted(layer.placement.trainable) for name, layer in layers},
        full_tensor=full_tensor or (lambda parameter: parameter),
        base=find_base(model),
        tokenizer=tokenizer,
        record={"selection": None if selection is None else dict(selection)},
    )


def write_model(
    model: PreTrainedModel,
    folder: Path,
    names: AdapterNames,
    experts: Mapping[str, Sequence[int]],
    *,
    full_tensor: FullTensor,
    **options: Any,
) -> Path:
    """`write_adapter` with what trains in a model with our layers. experts: all of them, in the order to be noted."""
    layers = moe_layers(model)
    grid = layers[0][1].grid
    contents = Contents({index: list(ids) for index, ids in experts.items() if ids}, trained_dense(model, names))
    ours = model.state_dict(keep_vars=True)
    spans = [(layer.origin, layer.trainable) for _, layer in layers if layer.trainable is not None]
    dtypes = {origin.stock_name(name): p.dtype for origin, span in spans for name, p in span.named_parameters()}

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return (full_tensor(tensor) if isinstance(tensor, nn.Parameter) else tensor).detach()

    def pieces() -> Iterator[list[Piece]]:
        for group in names.dense_groups(contents.dense):
            tensors = {name: whole(ours[our_name(name, names.descriptions)]) for name in group.names()}
            yield list(names.plan.convert(group, tensors, names.skeleton).items()) if grid.rank == 0 else []
        for origin, span in spans:
            for parameter_name, parameter in span.named_parameters():
                stacked = whole(parameter)
                for seat, expert in enumerate(span.seat_ids):
                    if expert is not None and grid.expert_data_rank == 0:
                        tensor = ExpertTensor(origin.stock_name(parameter_name), expert)
                        yield names.split(tensor, origin.turn(stacked[seat]))

    return write_adapter(
        folder,
        names,
        contents,
        pieces(),
        grid=grid,
        dtype_of=lambda name: dtypes.get(name) or ours[our_name(name, names.descriptions)].dtype,
        **options,
    )


def trained_dense(model: PreTrainedModel, names: AdapterNames) -> tuple[str, ...]:
    """Stock names of the parameters outside the routed experts that train."""
    ours = model.state_dict(keep_vars=True)
    stock = {our_name(name, names.descriptions): name for group in names.plan.dense for name in group.names()}
    return tuple(name for own, name in stock.items() if ours[own].requires_grad)


def write_adapter(
    folder: Path,
    names: AdapterNames,
    contents: Contents,
    pieces: Iterable[list[Piece]],
    *,
    grid: Grid,
    dtype_of: Callable[[str], torch.dtype],
    base: Base | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: Mapping[str, Any],
    into: bool = False,
) -> Path:
    """Write an adapter whose tensors come as `pieces` (name in the adapter, tensor). Collective.

    dtype_of: dtype of a tensor by its stock name. base: the base model, whose configuration and tokenizer come
    along; None where it is not known. record: what else the manifest says. into: `folder` may hold other files,
    as that of a Trainer does; an adapter in it is replaced.
    """
    entries = _entries(names, contents, dtype_of)
    if not entries:
        raise UserError("there is nothing to write: no expert and no other parameter trains in this model")
    partial = folder / ".adapter.partial" if into else folder.parent / f".{folder.name}.partial"
    shards = ShardSet(partial, entries, shard_bytes=SHARD_BYTES)

    def prepare() -> None:
        if not into and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
            raise UserError(f"{folder} already exists and is not empty; write to a new folder or remove it first")
        if partial.exists():
            shutil.rmtree(partial)  # left by a process that was cut off
        partial.mkdir(parents=True)
        shards.create()

    def finish() -> None:
        write_expert_config(partial / EXPERTS, contents.config())
        _companions(partial, names, base, tokenizer)
        manifest = {
            "format": FORMAT,
            "base": {
                "model": None if base is None else str(base.folder),
                "model_type": names.skeleton.config.model_type,
                "fingerprint": None if base is None else base.fingerprint,
            },
            "experts": sum(map(len, contents.experts.values())),
            "tensors": len(entries),
            "bytes": sum(entry.nbytes for entry in entries.values()),
            **record,
            "moe_dist": __version__,
            "files": {file.name: describe_file(file) for file in weight_files(partial)},
        }
        write_json(partial / MANIFEST, manifest)
        sync_folder(partial)
        _publish(partial, folder)

    together = Together(grid, "saving the adapter")
    try:
        together.run(prepare, only=grid.rank == 0)
        for some in pieces:
            together.attempt(lambda some=some: [shards.write(key, tensor) for key, tensor in some])
        together.run(shards.close)
        together.run(finish, only=grid.rank == 0)
    except BaseException:
        if grid.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _entries(names: AdapterNames, contents: Contents, dtype_of: Callable[[str], torch.dtype]) -> dict[str, Entry]:
    entries = {}
    state = names.skeleton.state_dict()
    for group in names.dense_groups(contents.dense):
        metas = {name: torch.empty_like(state[name], dtype=dtype_of(name)) for name in group.names()}
        for key, tensor in names.plan.convert(group, metas, names.skeleton).items():
            entries[key] = Entry(tuple(tensor.shape), tensor.dtype)
    for tensor in names.expert_tensors(contents.experts):
        for key, shape in zip(names.keys(tensor), names.part_shapes(tensor), strict=True):
            entries[key] = Entry(shape, dtype_of(tensor.name))
    return entries


def _companions(
    folder: Path, names: AdapterNames, base: Base | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Configuration and tokenizer: the base model's own files, unread, but for a tokenizer that is given."""
    patterns = ["config.json", "generation_config.json"]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        patterns += TOKENIZER_FILES
    if base is None:
        names.skeleton.config.save_pretrained(folder)
        return
    for file in (file for pattern in patterns for file in base.folder.glob(pattern) if file.is_file()):
        shutil.copyfile(file, folder / file.name)


def _publish(partial: Path, folder: Path) -> None:
    """Make what was written appear under `folder`: by one rename, or file by file where the folder holds others.

    A folder counts as an adapter by its expert config: it goes first and comes last.
    """
    if partial.parent != folder:
        note_folder(partial, folder)
        os.rename(partial, folder)
        sync_folder(folder.parent)
        return
    for old in (EXPERTS, MANIFEST, *(file.name for file in folder.glob("model*.safetensors*"))):
        (folder / old).unlink(missing_ok=True)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == EXPERTS):
        os.replace(file, folder / file.name)
    partial.rmdir()
    sync_folder(folder)
