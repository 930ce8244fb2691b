"""The model of a proof: a small Hugging Face folder with a few layers of the user's own, or of random weights.

Tensors are copied as they are on disk, under names with the new numbers of their layers. Both sides of the proof load
this folder, each by its own code, so that loading is proved as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from moe_dist.errors import UserError
from moe_dist.models.conversion import plan_reading
from moe_dist.models.families import describe_experts, expert_counts
from moe_dist.models.folder import WeightFiles, open_weights
from moe_dist.models.shards import Entry, ShardSet
from moe_dist.models.skeleton import build_skeleton, model_class
from moe_dist.prove.layers import layers_path


def copy_layers(folder: Path, config: PreTrainedConfig, kept: Sequence[int], out: Path) -> None:
    """Write the weights of the layers `kept` of the model in `folder`, and of all that is in no layer, to `out`, an
    existing folder. config: of the whole model."""
    files = open_weights(folder)
    names = kept_keys(files, config, kept)
    entries = {new: Entry(files.tensors[old].shape, files.tensors[old].dtype) for old, new in names.items()}
    shards = ShardSet(out, entries)
    shards.create()
    with files:
        for old, new in names.items():
            shards.write(new, files.read(old))
    shards.close()


def kept_keys(files: WeightFiles, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, str]:
    """Key on disk -> its key in the cut folder, of every tensor that the cut model has a place for."""
    skeleton = build_skeleton(config, torch.float32)
    shapes = {key: info.shape for key, info in files.tensors.items()}
    plan = plan_reading(skeleton, shapes, expert_counts(describe_experts(skeleton)))
    targets = [(group.first_target, group.names()) for group in plan.dense]
    targets += [(name, [key for row in layout.keys for key in row]) for name, layout in plan.experts.items()]
    inside = re.compile(re.escape(layers_path(skeleton)) + r"\.(\d+)\.")
    names = {}
    for target, keys in targets:
        found = inside.match(target)
        if found is None:
            names |= {key: key for key in keys}
        elif int(found.group(1)) in kept:
            names |= {key: _renumbered(key, int(found.group(1)), kept) for key in keys}
    return names


def _renumbered(key: str, index: int, kept: Sequence[int]) -> str:
    new, count = re.subn(rf"((?:^|\.)\w+\.){index}(?=\.)", rf"\g<1>{kept.index(index)}", key, count=1)
    if not count:
        raise UserError(f"{key}: a tensor of layer {index} without this number in its name, so it cannot be cut")
    return new


@torch.no_grad()
def make_random(cut: PreTrainedConfig, out: Path, *, seed: int) -> None:
    """Write a random model of an inline configuration to the folder `out`, in float32.

    Matrices are drawn so that activations keep their size; vectors get noise around what the family starts them at, so
    that two of them are never the same and none is without effect.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cut.dtype = torch.float32
        model = model_class(cut)(cut)
        for _, tensor in sorted(model.state_dict().items()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape)
                tensor.copy_(noise * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else tensor + 0.1 * noise)
    with without_progress_bars():
        model.save_pretrained(out)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for each file."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()
