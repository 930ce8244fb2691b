"""A model's folder with some tensors replaced: its files are copied as they are, and bytes written over.

Everything else is the base to the bit, whatever the layout on disk, and no model is ever in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_dist.config.strict_json import write_json
from moe_dist.data.atomic import new_folder
from moe_dist.errors import UserError
from moe_dist.models.export import TOKENIZER_FILES
from moe_dist.models.folder import INDEX, TensorInfo, WeightFiles

Patch = tuple[str, torch.Tensor, int | None]  # key on disk, values, row of the tensor's dimension 0


def check_new(out: Path) -> None:
    """UserError unless `out` is new or an empty folder."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} already exists and is not empty; write to a new folder or remove it first")


def write_patched(
    base: Path,
    files: WeightFiles,
    out: Path,
    patches: Iterable[Patch],
    *,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write `base` with `patches` in it as `out`, which appears whole or not at all. One process.

    files: the weights of `base`, whose dtypes stay. Patches come one at a time. Configuration, generation
    configuration and tokenizer are the base's. beside: JSON files that come along, by name. Raises UserError where
    `out` is taken or cannot be written.
    """
    check_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out, marker="config.json") as folder:
            _copy(base, folder, {info.file for info in files.tensors.values()})
            for key, value, row in patches:
                _write(folder, files.tensors[key], value, row)
            for name, tree in (beside or {}).items():
                write_json(folder / name, tree)
            for file in folder.iterdir():
                _sync(file)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    return out


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
