"""The experts and the router of a mixture in memory, back to the files of a MiXSE folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from moe_dist.config.strict_json import read_json, write_json
from moe_dist.data.atomic import sync_folder, write_durably
from moe_dist.models.adapter import CONFIG, MANIFEST, PREFIX, WEIGHTS, open_lora
from moe_dist.models.folder import describe_file
from moe_dist.models.mixse.install import ROUTER
from moe_dist.models.mixse.loading import ROUTER_FILE
from moe_dist.models.mixse.spec import KEY


def collect(
    model: PreTrainedModel, whole: Callable[[nn.Parameter], torch.Tensor], *, keep: bool
) -> dict[str, torch.Tensor]:
    """Experts and router by their names in the model, copied; nothing where not `keep`. All ranks step together."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{ROUTER}.") or name.endswith((".experts_a", ".experts_b")):
            tensor = whole(parameter)
            if keep:
                found[name] = tensor.detach().to("cpu", copy=True)
    return found


def write_experts(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write `tensors` (of `collect`) into the folder that is being built.

    An expert whose tensors are still those that were read keeps its files, so neither a change of dtype nor a router's
    training touches its bits. Any other is written in the dtype that it has in memory, its configuration as it was.
    """
    (folder / KEY).mkdir()
    for name, rows in model.mixse.spec.slices().items():
        source, target = model.source_folder / KEY / name, folder / KEY / name
        target.mkdir()
        adapter, pairs, changed = open_lora(source), {}, False
        with adapter.files:
            for module in adapter.targets:
                a, b = tensors[f"{module}.experts_a"][rows], tensors[f"{module}.experts_b"][rows].t()
                pairs[module] = a, b
                before = adapter.pair(module)
                changed |= any(not torch.equal(old.to(new.dtype), new) for old, new in zip(before, (a, b), strict=True))
        link_or_copy(source / CONFIG, target / CONFIG)
        if changed:
            named = {f"{PREFIX}{m}.lora_{s}.weight": t for m, p in pairs.items() for s, t in zip("AB", p, strict=True)}
            data = save({key: tensor.contiguous() for key, tensor in named.items()}, metadata={"format": "pt"})
            write_durably(target / WEIGHTS, data)
        else:
            link_or_copy(source / WEIGHTS, target / WEIGHTS)
        if (source / MANIFEST).is_file():
            files = {file: describe_file(target / file) for file in (CONFIG, WEIGHTS)}
            write_json(target / MANIFEST, {**read_json(source / MANIFEST), "files": files})
        sync_folder(target)
    write_router(folder, {k.removeprefix(f"{ROUTER}."): t for k, t in tensors.items() if k.startswith(f"{ROUTER}.")})


def write_router(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the router's file, always float32, into a MiXSE folder that is being built, after the experts."""
    plain = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    write_durably(folder / KEY / ROUTER_FILE, save(plain, metadata={"format": "pt"}))
    sync_folder(folder / KEY)


def link_or_copy(source: Path, target: Path) -> None:
    """`target` becomes `source` under another name; a copy where the file system has no such links."""
    source = source.resolve()  # in the hub's cache the files are links that say where the data is
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
