"""Ways to damage a checkpoint on disk, and to make the manifest vouch for it: what an attacker or a bug would do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from moe_dist.checkpoint.format import MANIFEST, FileRecord, encode_manifest, read_manifest


def trust(path: Path, name: str) -> None:
    """Write the size and hash that a file has now into the manifest, so that only its content can give it away."""
    manifest = read_manifest(path)
    data = (path / name).read_bytes()
    files = {**manifest.files, name: FileRecord(len(data), hashlib.sha256(data).hexdigest())}
    (path / MANIFEST).write_bytes(encode_manifest(replace(manifest, files=files)))


def rewrite_tensors(file: Path, change) -> None:
    """Let `change(header)` edit a safetensors header in place; the data stays."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    change(header)
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def flip(file: Path, position: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def swap(first: Path, second: Path) -> None:
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
