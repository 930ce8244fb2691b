"""LoRA experts in their base's weights: a dense model that plain transformers loads.

One expert is W + (alpha / rank) · B A; several are combined weight by weight, by a function of their changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint import fingerprint
from moe_dist.config.strict_json import read_json
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.composition.merging import Combine
from moe_dist.models.adapter import LoraAdapter, open_lora
from moe_dist.models.conversion import plan_reading
from moe_dist.models.folder import WeightFiles, open_weights
from moe_dist.models.mixse.spec import KEY
from moe_dist.models.patched import Patch, check_new, write_patched
from moe_dist.models.skeleton import build_skeleton, read_config


def merge_adapter(base: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Write `base` with the LoRA expert in `adapter` merged into its weights; see `merge_adapters`."""
    return merge_adapters(base, [adapter], out, combine=lambda deltas: deltas[0])


def merge_adapters(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    combine: Combine,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write `base` with `combine([ΔW of each expert])` added to its weights as a Hugging Face folder. One process.

    base: of a mixture it is its base alone that counts. out: new or empty. An expert without a layer has a change of
    zeros there. Sums are taken in float32 and rounded once to the base's dtype; tensors that no adapter changes,
    configuration and tokenizer are the base's to the bit. One weight is in memory at a time. beside: JSON files that
    come along.
    Raises UserError where an adapter is damaged, does not fit, or was made for another base; nothing is left then.
    """
    base, out = Path(base), Path(out)
    check_new(out)
    config, files = read_config(base), open_weights(base)
    files.check()
    beside = dict(beside or {})
    if vars(config).pop(KEY, None) is not None:
        beside["config.json"] = {k: v for k, v in read_json(base / "config.json").items() if k != KEY}
    experts = [open_lora(adapter) for adapter in adapters]
    skeleton = build_skeleton(config, files.main_dtype())
    stored = plan_reading(skeleton, {key: info.shape for key, info in files.tensors.items()}, {})
    keys = {group.first_target: group.names()[0] for group in stored.dense if group.converter is None}
    linear = {name: module for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    known = fingerprint(base, experts=False)
    for expert in experts:
        expert.check_base(base, known)
        expert.check_shapes({name: tuple(module.weight.shape) for name, module in linear.items()})
        for target in expert.targets:
            if f"{target}.weight" not in keys:
                raise UserError(f"{expert.folder}: {target} is not stored by itself in {base}, and cannot be changed")
    return write_patched(base, files, out, _patches(experts, combine, files, keys), beside=beside)


def _patches(
    experts: Sequence[LoraAdapter], combine: Combine, files: WeightFiles, keys: Mapping[str, str]
) -> Iterator[Patch]:
    with ExitStack() as stack:
        for opened in (files, *(expert.files for expert in experts)):
            stack.enter_context(opened)
        for target in sorted({target for expert in experts for target in expert.targets}):
            key = keys[f"{target}.weight"]
            weight = files.read(key).float()
            yield key, weight + combine([_change(expert, target, weight) for expert in experts]), None


def _change(expert: LoraAdapter, target: str, weight: torch.Tensor) -> torch.Tensor:
    """ΔW of one expert, float32, in the shape of the weight."""
    if target not in expert.targets:
        return torch.zeros_like(weight)
    a, b = (part.float() for part in expert.pair(target))
    return expert.scale * (b @ a)
