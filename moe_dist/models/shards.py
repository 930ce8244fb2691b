"""Safetensors files that several ranks fill together, one tensor at a time.

The headers are written first, from names, shapes and dtypes alone; then every rank writes what it owns straight to its
place. So no rank ever holds more than one tensor, and the files are the same bits on any number of ranks. All ranks
must see the same file system.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from moe_dist.models.folder import DTYPES, INDEX, SINGLE

SHARD_BYTES = 5 * 2**30
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardSet:
    """The files of a model's weights in `folder`, cut in the order of `entries` at `shard_bytes`."""

    def __init__(self, folder: Path, entries: dict[str, Entry], *, shard_bytes: int = SHARD_BYTES):
        self.folder, self.entries = folder, entries
        groups: list[list[str]] = [[]]
        room = shard_bytes
        for key, entry in entries.items():
            if groups[-1] and entry.nbytes > room:
                groups.append([])
                room = shard_bytes
            groups[-1].append(key)
            room -= entry.nbytes
        count = len(groups)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self.headers: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.places: dict[str, tuple[str, int]] = {}
        for name, keys in zip(names, groups, strict=True):
            self._lay_out(name, keys)
        self.streams: dict[str, BinaryIO] = {}

    def _lay_out(self, name: str, keys: list[str]) -> None:
        """Offsets within one file: widest dtype first, as the format asks for the sake of alignment."""
        offset, offsets, header = 0, {}, {"__metadata__": {"format": "pt"}}
        for key in sorted(keys, key=lambda key: (-self.entries[key].dtype.itemsize, key)):
            entry = self.entries[key]
            header[key] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offsets[key] = offset
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self.headers[name] = struct.pack("<Q", len(text)) + text
        self.sizes[name] = start + offset
        self.places |= {key: (name, start + at) for key, at in offsets.items()}

    def create(self) -> None:
        """Write the headers, the index where there are several files, and reserve the room. One rank does it."""
        for name, header in self.headers.items():
            with (self.folder / name).open("wb") as stream:
                stream.write(header)
                stream.truncate(self.sizes[name])
        if len(self.headers) > 1:
            total = sum(entry.nbytes for entry in self.entries.values())
            weight_map = {key: place[0] for key, place in sorted(self.places.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, key: str, tensor: torch.Tensor, *, row: int | None = None) -> None:
        """Write a tensor, or one row of its dimension 0, to its place. Raises OSError, as where the disk is full."""
        entry = self.entries[key]
        name, at = self.places[key]
        shape = entry.shape if row is None else entry.shape[1:]
        assert tuple(tensor.shape) == shape, f"{key}: {tuple(tensor.shape)} does not fit {shape}"
        assert tensor.dtype == entry.dtype, f"{key}: {tensor.dtype} is not {entry.dtype}"
        if name not in self.streams:
            self.streams[name] = (self.folder / name).open("r+b", buffering=0)
        stream = self.streams[name]
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        stream.seek(at + (row or 0) * len(data))
        while data:
            data = data[stream.write(data) :]

    def close(self) -> None:
        """Bring this rank's writes to the disk."""
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            with stream:
                os.fsync(stream.fileno())
