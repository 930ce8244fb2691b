"""MiXSE folders: the base's Hugging Face folder, and under `mixse/` an adapter an expert and the router.

    config.json, model*.safetensors, tokenizer ...   the base, with one more key `mixse` in config.json
    mixse/<expert>/                                  an adapter that PEFT loads
    mixse/router.safetensors                         weight [n, H] and, where it has one, bias [n]; float32

Plain transformers reads such a folder as the base model. Its files are hard links to the base's where the file system
has them, so a mixture costs no second base on disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_dist.config.strict_json import write_json
from moe_dist.data.atomic import new_folder, sync_folder, write_durably
from moe_dist.errors import UserError
from moe_dist.models.adapter import CONFIG as CONFIG_OF_ADAPTER
from moe_dist.models.adapter import MANIFEST, WEIGHTS, LoraAdapter, open_lora
from moe_dist.models.export import TOKENIZER_FILES
from moe_dist.models.families import find_experts
from moe_dist.models.folder import INDEX, open_weights
from moe_dist.models.loading import resolve_folder
from moe_dist.models.mixse.exporting import link_or_copy, write_router
from moe_dist.models.mixse.install import decoder_blocks, linear_layers
from moe_dist.models.mixse.router import initial_router
from moe_dist.models.mixse.spec import KEY, MixseSpec
from moe_dist.models.skeleton import build_skeleton, read_config

CONFIG = "config.json"


def write_mixse_folder(
    base_folder: str | Path,
    adapters: Mapping[str, str | Path],
    out: str | Path,
    *,
    router_input: str = "block_input",
    top_k: int = 1,
    bias: bool = False,
    routing: str = "learned",
    seed: int = 0,
    base_fingerprint: str | None = None,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Compose a base model and LoRA experts, by their names in order, into a mixture with a new router. One process.

    base_folder: folder or hub name of a dense model. out: new or empty. `seed` draws the router (and random routing).
    base_fingerprint: of the base, as `checkpoint.fingerprint` gives it; needed where an adapter says what it was
    trained on. beside: JSON files that come along, by name. The other arguments are those of `MixseSpec`.

    Raises UserError, before anything is written, for an adapter that is no plain LoRA or belongs to another base,
    naming its folder and the tensor, and for values that no mixture has.
    """
    base, out = resolve_folder(base_folder), Path(out)
    config = read_config(base)
    if getattr(config, KEY, None) is not None:
        raise UserError(f"{base} is a mixture itself; compose the experts over its base")
    weights = open_weights(base)
    skeleton = build_skeleton(config, torch.float32)
    if next(find_experts(skeleton), None) is not None:
        raise UserError(f"{base} has routed experts of its own; LoRA experts are mixed over a dense model")
    opened = {name: open_lora(folder) for name, folder in adapters.items()}
    shapes = _block_layers(skeleton)
    for adapter in opened.values():
        adapter.check_shapes(shapes)
        if adapter.base_fingerprint is not None:
            if base_fingerprint is None:
                raise UserError(f"{adapter.folder} names its base by fingerprint: give base_fingerprint to compare")
            adapter.check_base(base, base_fingerprint)
    spec = MixseSpec(
        experts=tuple(opened),
        ranks=tuple(adapter.rank for adapter in opened.values()),
        scales=tuple(adapter.scale for adapter in opened.values()),
        targets=tuple(sorted({t.rpartition(".")[2] for a in opened.values() for t in a.targets})),
        router_input=router_input,
        top_k=top_k,
        bias=bias,
        routing=routing,
        seed=seed,
    ).check("mixture")
    router = initial_router(config.get_text_config().hidden_size, len(opened), bias=bias, seed=seed)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} already exists and is not empty; write to a new folder or remove it first")
    files = {info.file for info in weights.tensors.values()}
    files |= {base / name for name in (INDEX, "generation_config.json") if (base / name).is_file()}
    files |= {file for pattern in TOKENIZER_FILES for file in base.glob(pattern) if file.is_file()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out, marker=CONFIG) as partial:
            for file in sorted(files):
                link_or_copy(file, partial / file.name)
            (partial / KEY).mkdir()
            for name, adapter in opened.items():
                _take_over(adapter, partial / KEY / name)
            write_router(partial, router)
            for name, tree in (beside or {}).items():
                write_json(partial / name, tree)
            values = json.loads((base / CONFIG).read_text(encoding="utf-8")) | {KEY: spec.to_dict()}
            write_durably(partial / CONFIG, (json.dumps(values, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    return out


def _take_over(adapter: LoraAdapter, folder: Path) -> None:
    folder.mkdir()
    for name in (CONFIG_OF_ADAPTER, WEIGHTS, MANIFEST):
        if (adapter.folder / name).is_file():
            link_or_copy(adapter.folder / name, folder / name)
    sync_folder(folder)


def _block_layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path of each linear layer of the decoder blocks -> the shape of its weight."""
    _, blocks = decoder_blocks(model)
    (prefix,) = (name for name, module in model.named_modules() if module is blocks)
    return {
        f"{prefix}.{index}.{name}": tuple(layer.weight.shape)
        for index, block in enumerate(blocks)
        for name, layer in linear_layers(block)
    }
