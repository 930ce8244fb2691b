"""Writing one rank's safetensors file as a stream, and reading ranges of it through the file mapping.

The header of a safetensors file comes first and holds every offset, and all sizes are known beforehand: so the header
is laid out from sizes and dtypes, and the tensors follow one chunk at a time. Nothing is gathered, and a tensor on an
accelerator costs the host one chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.format import FileRecord

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK_BYTES = 16 << 20
_HAND_OVER_BYTES = 1 << 20
# Readers of the format refuse a longer header, so a file that had one could be written and never read.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Layout:
    """A file to be: its header's bytes, then `tensors` (1-D, any device), in this order, without a gap."""

    header: bytes
    tensors: tuple[torch.Tensor, ...]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


def lay_out(named: Sequence[tuple[str, torch.Tensor]]) -> Layout:
    """Lay out 1-D tensors under unique keys. Wide dtypes come first, so that each tensor is aligned to its own size."""
    ordered = sorted(named, key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, tensor in ordered:
        if tensor.dim() != 1:
            raise CheckpointError(f"{key}: fragments are 1-D, this one has the shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{key}: {tensor.dtype} cannot be stored")
        if key in header:
            raise CheckpointError(f"{key}: given twice")
        end = position + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{len(named):,} fragments make a header of {len(text):,} bytes; safetensors allows 100 MB"
        )
    return Layout(len(text).to_bytes(8, "little") + text, tuple(tensor for _, tensor in ordered))


def write_stream(path: Path, chunks: Iterator[memoryview | bytes]) -> FileRecord:
    """Write a new file, hash it on the way, and return once it is on the disk. OSError as the system raises it."""
    digest, size = hashlib.sha256(), 0
    # Unbuffered, so that a full disk shows in `write` and not a second time in `close`.
    with open(path, "xb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        for chunk in chunks:
            # Hashing runs beside writing, unless handing a small chunk over would take longer than hashing it.
            hashed = hasher.submit(digest.update, chunk) if len(chunk) >= _HAND_OVER_BYTES else digest.update(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
            if hashed is not None:
                hashed.result()
            size += len(chunk)
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def write_layout(path: Path, layout: Layout) -> FileRecord:
    return write_stream(path, _chunks(layout))


def _chunks(layout: Layout) -> Iterator[memoryview | bytes]:
    """The file's bytes. A chunk is valid until the next one is asked for: one staging buffer serves them all."""
    yield layout.header
    staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8)  # no memory until it is written to
    for tensor in layout.tensors:
        step = CHUNK_BYTES // tensor.element_size()
        for start in range(0, tensor.numel(), step):
            piece = tensor.detach()[start : start + step]
            if piece.device.type != "cpu" or not piece.is_contiguous():
                staged = staging[: piece.numel() * piece.element_size()].view(piece.dtype)
                piece = staged.copy_(piece)
            yield memoryview(piece.view(torch.uint8).numpy())


class TensorFile:
    """A mapped safetensors file. Every error names the file, and the tensor where there is one."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not readable as safetensors ({error})") from None
        self._keys = frozenset(self._file.keys())

    def read(self, key: str, start: int, stop: int, *, dtype: str, numel: int) -> torch.Tensor:
        """Elements `[start, stop)` of a 1-D tensor, as a view of the mapping: copy it before the file is closed.

        `dtype` and `numel` are what the index promises; a file that holds anything else is refused.
        """
        if key not in self._keys:
            raise CheckpointError(f"{self.path}: {key} is missing")
        part = self._file.get_slice(key)
        found = (part.get_dtype(), list(part.get_shape()))
        if found != (dtype, [numel]):
            raise CheckpointError(f"{self.path}: {key} is {found[0]} {found[1]}, the index says {dtype} [{numel}]")
        return part[start:stop]
