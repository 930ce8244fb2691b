"""Merging: a base model's folder with the weights of adapters in it, which plain transformers loads.

The base's files are copied as they are and the bytes of the selected experts written over, one tensor at a time. So
everything else is the base to the bit, whatever the layout on disk, and no model is ever in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from moe_dist.data.atomic import new_folder
from moe_dist.errors import UserError
from moe_dist.methods.esft.adapter_folder import Adapter, Base, open_adapter
from moe_dist.methods.esft.adapter_load import check_overlap
from moe_dist.methods.esft.adapter_names import AdapterNames
from moe_dist.models.conversion import ReadPlan, plan_reading
from moe_dist.models.export import TOKENIZER_FILES
from moe_dist.models.folder import INDEX, TensorInfo, open_weights
from moe_dist.models.skeleton import read_config

Patch = tuple[str, torch.Tensor, int | None]  # key on disk, values, row of the tensor's dimension 0


def merge_adapters(
    adapters: Sequence[str | Path], out: str | Path, *, base: str | Path, overlap: str = "error"
) -> Path:
    """Write `base` with the experts of `adapters` in it as a Hugging Face folder. One process.

    out: new or empty. Weights have the base's dtypes; configuration, generation configuration and tokenizer are the
    base's. overlap: for adapters that hold the same expert, "error" or "last" (the later one in the list wins).
    Raises UserError where an adapter is damaged, does not fit, or was made for another base; nothing is left then.
    """
    base, out = Path(base), Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} already exists and is not empty; write to a new folder or remove it first")
    config, files = read_config(base), open_weights(base)
    files.check()
    names = AdapterNames(config, files.main_dtype())
    plan = plan_reading(names.skeleton, {key: info.shape for key, info in files.tensors.items()}, names.counts)
    opened = [open_adapter(adapter, names) for adapter in adapters]
    of = Base(base)
    for adapter in opened:
        adapter.check_base(of)
    check_overlap(opened, overlap)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out, marker="config.json") as folder:
            _copy(base, folder, {info.file for info in files.tensors.values()})
            for adapter in opened:
                with adapter.files:
                    for key, value, row in _patches(adapter, plan):
                        _write(folder, files.tensors[key], value, row)
            for file in folder.iterdir():
                _sync(file)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    return out


def _patches(adapter: Adapter, plan: ReadPlan) -> Iterator[Patch]:
    """What an adapter changes in the base's files, as those files keep it."""
    for tensor in adapter.experts:
        layout = plan.experts[tensor.name]
        row = tensor.expert if layout.stacked else None
        for key, part in zip(layout.keys[tensor.expert], layout.split(adapter.expert(tensor)), strict=True):
            yield key, part, row
    homes = {group.first_target: group for group in plan.dense}
    for name, value in adapter.others() if adapter.dense else ():
        group = homes.get(name)
        if group is None or group.converter is not None:
            raise UserError(
                f"{adapter.folder}: {name} is not stored by itself in the base, and cannot be replaced there"
            )
        yield group.names()[0], value, None


def _copy(base: Path, folder: Path, weights: set[Path]) -> None:
    """The base's weights, index, configurations and tokenizer; no code, and no weights in another format."""
    patterns = (INDEX, "config.json", "generation_config.json", *TOKENIZER_FILES)
    others = {file for pattern in patterns for file in base.glob(pattern) if file.is_file()}
    for file in sorted(weights | others):
        shutil.copyfile(file, folder / file.name)


def _write(folder: Path, info: TensorInfo, value: torch.Tensor, row: int | None) -> None:
    """Write a tensor, or one row of it, over its bytes in the copied file."""
    shape = info.shape if row is None else info.shape[1:]
    assert tuple(value.shape) == shape, f"{tuple(value.shape)} does not fit {shape}"
    data = value.to(info.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
    with (folder / info.file.name).open("r+b") as stream:
        stream.seek(info.start + (row or 0) * len(data))
        stream.write(data)


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
