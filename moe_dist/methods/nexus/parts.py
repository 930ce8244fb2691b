"""Writing a model folder part by part: each tensor is a copy, a mean, a blend, or made, and says where it comes from.

What is only copied is never rounded, nor held in memory: it goes from one mapped file to the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from moe_dist.data.atomic import new_folder
from moe_dist.errors import UserError
from moe_dist.methods.nexus.finish import finish
from moe_dist.methods.nexus.folders import ModelFolder
from moe_dist.methods.nexus.receipt import Receipt
from moe_dist.models.shards import SHARD_BYTES, Entry, ShardSet

CHUNK = 1 << 20  # elements that are held in float32 at once


@dataclass(frozen=True)
class Part:
    """One tensor to be written: the mean of `sources` (a copy where there is one), or what `make` returns.

    said: where it comes from, in words, for the receipt.
    """

    key: str
    entry: Entry
    said: str
    sources: tuple[tuple[ModelFolder, str], ...] = ()
    make: Callable[[], torch.Tensor] | None = None


def write_model(
    out: str | Path,
    parts: Sequence[Part],
    config: PreTrainedConfig,
    beside: Path,
    *,
    measure: Callable[[Path], Receipt],
    look: Callable[[Path], None] | None = None,
    files: Sequence[Path] = (),
    shard_bytes: int = SHARD_BYTES,
) -> Receipt:
    """Write `parts` and `config` to the folder `out`, new or empty; it appears whole or not at all.

    beside: the folder whose tokenizer and generation config come along. measure: looks at the written weights before
    the folder appears; what it returns is left in it as nexus_receipt.json. look: the same for the whole folder. files:
    are copied beside the weights. Raises UserError where `out` holds something; if looking raises, nothing appears.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} already exists and is not empty; give a new folder or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out, marker="config.json") as folder:
        shards = ShardSet(folder, {part.key: part.entry for part in parts}, shard_bytes=shard_bytes)
        shards.create()
        for part in parts:
            shards.write(part.key, _value(part))
        shards.close()
        receipt = measure(folder)
        finish(config, beside, folder, receipt, files)
        if look is not None:
            look(folder)
    return receipt


def mean_of(key: str, source: str, models: tuple[ModelFolder, ...]) -> Part:
    """The tensor `source` of one model, or its mean over several, under the name `key`."""
    info = models[0].tensors[source]
    names = ", ".join(model.name for model in models)
    said = f"copy of {names}" if len(models) == 1 else f"mean of {names}"
    return Part(key, Entry(info.shape, info.dtype), f"{said}: {source}", tuple((model, source) for model in models))


def filled(entry: Entry, value: float) -> Callable[[], torch.Tensor]:
    """One value everywhere."""
    return lambda: torch.full(entry.shape, value, dtype=entry.dtype)


def random(key: str, entry: Entry, std: float, seed: int) -> Callable[[], torch.Tensor]:
    """Values that depend on the seed and the tensor's name alone."""

    def make() -> torch.Tensor:
        digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randn(entry.shape, generator=generator).mul_(std).to(entry.dtype)

    return make


def _value(part: Part) -> torch.Tensor:
    if part.make is not None:
        return part.make()
    if len(part.sources) == 1:
        model, key = part.sources[0]
        return model.read(key)
    return mean([model.read(key) for model, key in part.sources])


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """(1/n) Σ φ_i, in float32 (float64 stays), rounded once to the tensors' dtype. Holds the result and few MiB."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    result = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    flat, sources = result.view(-1), [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat.numel(), CHUNK):
        chunk = slice(start, start + CHUNK)
        total = sources[0][chunk].to(wide, copy=True)
        for source in sources[1:]:
            total += source[chunk]
        flat[chunk] = total / len(tensors)
    return result


def blend(old: torch.Tensor, new: torch.Tensor, share: float) -> torch.Tensor:
    """(1 − λ)·old + λ·new as old + λ·(new − old), so that equal tensors stay as they are; in float32, rounded once."""
    wide = torch.promote_types(old.dtype, torch.float32)
    result = torch.empty_like(old, memory_format=torch.contiguous_format)
    flat, ours, theirs = result.view(-1), old.reshape(-1), new.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        chunk = slice(start, start + CHUNK)
        before = ours[chunk].to(wide)
        flat[chunk] = before + share * (theirs[chunk].to(wide) - before)
    return result
