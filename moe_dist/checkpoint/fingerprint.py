"""The identity of a model folder's tensors, so that frozen weights can be kept by reference.

Two ways, each with its own prefix so that they are never compared:

- "sampled": for every tensor its name, dtype and shape, and its bytes at regular places: the first and last 4 KiB and
  4 KiB out of every MiB. It reads under half a percent of a big model. Training, merging, or casting changes nearly
  every value of a tensor and so is seen; a single flipped bit between two samples is not.
- "full": every byte. For those who would rather wait.

Neither looks at file or folder names, at the sharding, or at anything but tensors: a copied or re-sharded folder is
the same model. The LoRA experts of a mixture belong to it, each under its name.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.format import check_plain_name, decode

SAMPLE_BYTES = 4096
STRIDE_BYTES = 1 << 20
_READ_BYTES = 16 << 20
EXPERTS = "mixse"  # where a mixture keeps its experts and its router, beside the weights of its base


def fingerprint(folder: str | Path, *, how: str = "sampled", experts: bool = True) -> str:
    """`"<how>:<sha256 hex>"` of the tensors of a Hugging Face model folder. CheckpointError if there are none.

    experts: false leaves out a mixture's experts and router: it is then its base.
    """
    folder = Path(folder)
    if how not in ("sampled", "full"):
        raise CheckpointError(f"{how!r} is no way to take a fingerprint; use 'sampled' or 'full'")
    entries: dict[str, bytes] = {}
    for path in _tensor_files(folder, experts=experts):
        with open(path, "rb") as file:
            data_start, header = _header(file, path)
            for name, entry in header.items():
                if path.parent != folder:
                    name = f"{path.parent.relative_to(folder)}/{name}"
                if name in entries:
                    raise CheckpointError(f"{path}: {name} is in another file of {folder} too")
                entries[name] = _digest(file, data_start, entry, how)
    whole = hashlib.sha256()
    for name, digest in sorted(entries.items()):
        whole.update(json.dumps(name).encode() + digest)
    return f"{how}:{whole.hexdigest()}"


def _tensor_files(folder: Path, *, experts: bool) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = decode(index.read_bytes(), where=str(index)).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: has no weight_map")
        names = sorted({check_plain_name(name, where=str(index)) for name in weight_map.values()})
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing")
    if not paths:
        raise CheckpointError(f"{folder}: no safetensors files there")
    return paths + (sorted(folder.glob(f"{EXPERTS}/**/*.safetensors")) if experts else [])


def _header(file: BinaryIO, path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """(where the data starts, the header's tensors), with every tensor inside the file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(f"{path}: not a safetensors file, or cut short")
    header = decode(file.read(length), where=f"header of {path}")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        try:
            start, stop = entry["data_offsets"]
            entry["dtype"], entry["shape"]
            inside = type(start) is type(stop) is int and 0 <= start <= stop <= size - 8 - length
        except (KeyError, TypeError, ValueError):
            inside = False
        if not inside:
            raise CheckpointError(f"{path}: {name} does not lie within the file; was it cut short?")
    return 8 + length, header


def _digest(file: BinaryIO, data_start: int, entry: dict[str, Any], how: str) -> bytes:
    start, stop = entry["data_offsets"]
    digest = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
    for offset, length in _spans(stop - start, how):
        file.seek(data_start + start + offset)
        digest.update(file.read(length))
    return digest.digest()


def _spans(size: int, how: str) -> list[tuple[int, int]]:
    if how == "full" or size <= 2 * SAMPLE_BYTES:
        return [(offset, min(_READ_BYTES, size - offset)) for offset in range(0, size, _READ_BYTES)]
    spans = [(offset, min(SAMPLE_BYTES, size - offset)) for offset in range(0, size, STRIDE_BYTES)]
    return [*spans, (size - SAMPLE_BYTES, SAMPLE_BYTES)]
