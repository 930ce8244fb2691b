"""A Hugging Face model folder on disk: its weights as named slices, checked before anything is built.

Only safetensors are read, never pickles. Headers are parsed here, so that a truncated file, a missing shard or an index
that disagrees with its files is told apart and named; the data is then read through safetensors' memory maps.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moe_dist.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own reader

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is. start: offset of its first byte in the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int


@dataclass
class WeightFiles:
    """All tensors of a folder. A context manager: the files stay mapped while it is open."""

    tensors: dict[str, TensorInfo]
    _open: dict[Path, safe_open] = field(default_factory=dict)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_) -> None:
        self._open.clear()

    def read(self, key: str) -> torch.Tensor:
        """A tensor, whole. Its memory may be the mapped file: copy before writing to it. UserError for a NaN in it."""
        return self._checked(key, self._handle(key).get_tensor(key))

    def read_row(self, key: str, row: int) -> torch.Tensor:
        """One row of a tensor's dimension 0; no other row is touched. UserError for a NaN in it."""
        return self._checked(key, self._handle(key).get_slice(key)[row])

    def _checked(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        # A NaN makes the sum one: a pass without a mask as long as the tensor. So do infinities of both signs.
        wide = tensor.is_floating_point() and tensor.element_size() > 1
        if wide and tensor.sum().isnan() and tensor.isnan().any():
            raise UserError(f"{self.tensors[key].file}: the tensor {key} holds a NaN, so the file is damaged")
        return tensor

    def check(self) -> None:
        """UserError unless every file is sound: tensors side by side in it, each with the bytes of its shape."""
        with self:
            for key in {info.file: key for key, info in self.tensors.items()}.values():
                self._handle(key)

    def main_dtype(self) -> torch.dtype:
        """The floating dtype that most elements are stored in."""
        elements: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                count = torch.Size(info.shape).numel()
                elements[info.dtype] = elements.get(info.dtype, 0) + count
        if not elements:
            raise UserError("the folder holds no floating-point tensor")
        return max(elements, key=elements.get)

    def _handle(self, key: str) -> safe_open:
        file = self.tensors[key].file
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} cannot be read as safetensors: {error}") from None
        return self._open[file]


def open_weights(folder: Path) -> WeightFiles:
    """The tensors of the safetensors file(s) in `folder`.

    Raises UserError for a missing or truncated file, a path in the index that leaves the folder, tensors that index
    and files do not agree about, and a folder with pickled weights only.
    """
    index = folder / INDEX
    if index.is_file():
        listed = _read_index(index)
    elif (folder / SINGLE).is_file():
        listed = dict.fromkeys(_header(folder / SINGLE), SINGLE)
    else:
        raise _no_weights(folder)
    found: dict[str, TensorInfo] = {}
    for name in sorted(set(listed.values())):
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder}: the index names the shard {name}, which is not there")
        for key, info in _header(file).items():
            if key in found:
                raise UserError(f"tensor {key} is in {found[key].file.name} and again in {name}")
            if listed.get(key) != name:
                says = f"puts it in {listed[key]}" if key in listed else "does not list it"
                raise UserError(f"{file} holds the tensor {key}, but {INDEX} {says}")
            found[key] = info
    missing = sorted(set(listed) - set(found))
    if missing:
        raise UserError(f"{folder}: {INDEX} lists tensors that no shard holds: {_some(missing)}")
    return WeightFiles(found)


def open_file(file: Path) -> WeightFiles:
    """The tensors of one safetensors file. Raises UserError for one that is truncated or damaged."""
    return WeightFiles(_header(file))


def describe_file(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as the manifest of an adapter has them."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _read_index(index: Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        assert isinstance(listed, dict)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{index} is not an index: expected a JSON object with a 'weight_map'") from None
    for key, name in listed.items():
        # A shard is a file beside its index; anything else is a mistake or an attack.
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
            raise UserError(f"{index}: {name!r} (tensor {key}) is not a file name inside the folder")
    return listed


def _header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file; the file's size is checked against what its header promises."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise UserError(f"{file} is truncated or damaged: {size} bytes cannot hold its header")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != size:
            short = "truncated" if size < end else "damaged"
            raise UserError(f"{file} is {short}: it has {size} bytes, its header promises {end}")
        return {
            key: TensorInfo(
                file, tuple(entry["shape"]), _dtype(file, key, entry["dtype"]), 8 + length + entry["data_offsets"][0]
            )
            for key, entry in entries.items()
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is truncated or damaged: its header is not that of a safetensors file") from None


def _dtype(file: Path, key: str, name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"{file}: tensor {key} has the dtype {name}, which is not supported")
    return DTYPES[name]


def _no_weights(folder: Path) -> UserError:
    pickled = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickled:
        return UserError(
            f"{folder} holds pickled weights only ({_some(pickled)}), which are not read because loading a pickle can "
            "run any code. If you trust them, convert the folder once: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return UserError(f"{folder} holds no weights: expected {SINGLE} or {INDEX}")


def _some(names: list[str], most: int = 8) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
