"""Composing: a base and its LoRA experts become one model, a mixture (MiXSE) or one of the baselines.

A mixture is a folder whose router is trained next, by `moe-dist train`; a merge is a dense model, and done.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from moe_dist import __version__
from moe_dist.checkpoint import fingerprint
from moe_dist.config.schema import LoraSection
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.composition.config import MERGES, ComposeConfig
from moe_dist.methods.self_moe.composition.merge import merge_adapters
from moe_dist.methods.self_moe.composition.merging import combination, settings_of
from moe_dist.methods.self_moe.composition.receipt import RECEIPT, ComposeReceipt, account
from moe_dist.models.adapter import open_lora, write_lora
from moe_dist.models.loading import resolve_folder
from moe_dist.models.lora import inject_lora, injected_config
from moe_dist.models.mixse.folder import write_mixse_folder
from moe_dist.models.patched import check_new
from moe_dist.models.skeleton import build_skeleton, read_config


def compose(config: ComposeConfig, out: str | Path) -> ComposeReceipt:
    """Write what `config.compose` asks for to `out`, new or empty, with its receipt. One process.

    Raises UserError where experts and base do not belong together; nothing is left then.
    """
    out = Path(out).expanduser()
    check_new(out)
    section = config.compose
    base = resolve_folder(section.base)
    known = fingerprint(base)
    if section.method != "joint":
        return _compose(config, base, known, section.experts, out)
    with tempfile.TemporaryDirectory(prefix="moe-dist-experts-") as folder:
        fresh = _new_experts(base, known, section.skills, config.lora, Path(folder))
        return _compose(config, base, known, fresh, out)


def _compose(
    config: ComposeConfig, base: Path, known: str, experts: Mapping[str, str | Path], out: Path
) -> ComposeReceipt:
    section = config.compose
    receipt = account(section, base, known, {name: open_lora(folder) for name, folder in experts.items()})
    beside = {RECEIPT: receipt.to_dict()}
    if section.method == "instance":
        merge_adapters(base, list(experts.values()), out, combine=lambda deltas: deltas[0], beside=beside)
    elif section.method in MERGES:
        combine = combination(section.method, experts=len(experts), **settings_of(section, experts=len(experts)))
        merge_adapters(base, list(experts.values()), out, combine=combine, beside=beside)
    else:
        write_mixse_folder(
            base,
            experts,
            out,
            router_input=section.router_input,
            top_k=len(experts) if section.method == "uniform" else section.top_k,
            bias=section.bias,
            routing=section.method if section.method in ("uniform", "random") else "learned",
            seed=section.seed,
            base_fingerprint=known,
            beside=beside,
        )
    return receipt


def _new_experts(base: Path, known: str, names: list[str], lora: LoraSection, root: Path) -> dict[str, Path]:
    """Experts that nothing has trained: A as PEFT draws it, from a seed of its own each, B zero."""
    skeleton = build_skeleton(read_config(base), torch.float32)
    inject_lora(skeleton, lora)
    shapes = {name: tensor.shape for name, tensor in skeleton.named_parameters() if ".lora_" in name}
    if not shapes:
        raise UserError(f"{base}: lora.targets leave no layer to put an expert into")
    folders = {}
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(lora.seed + index)
        tensors = {key: torch.zeros(shape) for key, shape in sorted(shapes.items())}
        for key, tensor in tensors.items():
            if ".lora_A." in key:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        manifest = {"base": {"model": str(base), "fingerprint": known}, "untrained": True, "moe_dist": __version__}
        folders[name] = write_lora(root / name, injected_config(skeleton), tensors, manifest)
    return folders
