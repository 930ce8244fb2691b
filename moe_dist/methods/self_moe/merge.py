"""Merging one LoRA expert into its base: a dense model, W + (alpha / rank) · B A, that plain transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from moe_dist.checkpoint import fingerprint
from moe_dist.errors import UserError
from moe_dist.models.adapter import LoraAdapter, open_lora
from moe_dist.models.conversion import plan_reading
from moe_dist.models.folder import WeightFiles, open_weights
from moe_dist.models.patched import Patch, check_new, write_patched
from moe_dist.models.skeleton import build_skeleton, read_config


def merge_adapter(base: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Write `base` with the LoRA expert in `adapter` merged into its weights as a Hugging Face folder. One process.

    out: new or empty. Sums are taken in float32 and rounded once to the base's dtype; tensors that the adapter does not
    change, configuration and tokenizer are the base's to the bit. One weight is in memory at a time.
    Raises UserError where the adapter is damaged, does not fit, or was made for another base; nothing is left then.
    """
    base, out = Path(base), Path(out)
    check_new(out)
    config, files = read_config(base), open_weights(base)
    files.check()
    expert = open_lora(adapter)
    expert.check_base(base, fingerprint(base))
    skeleton = build_skeleton(config, files.main_dtype())
    stored = plan_reading(skeleton, {key: info.shape for key, info in files.tensors.items()}, {})
    keys = {group.first_target: group.names()[0] for group in stored.dense if group.converter is None}
    linear = {name: module for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    expert.check_shapes({name: tuple(module.weight.shape) for name, module in linear.items()})
    for target in expert.targets:
        if f"{target}.weight" not in keys:
            raise UserError(f"{expert.folder}: {target} is not stored by itself in {base}, and cannot be changed there")
    return write_patched(base, files, out, _patches(expert, files, keys))


def _patches(expert: LoraAdapter, files: WeightFiles, keys: dict[str, str]) -> Iterator[Patch]:
    with files, expert.files:
        for target in expert.targets:
            key = keys[f"{target}.weight"]
            a, b = (part.float() for part in expert.pair(target))
            yield key, files.read(key).float() + expert.scale * (b @ a), None
