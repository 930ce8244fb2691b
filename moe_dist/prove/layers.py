"""Which layers of a model a proof keeps, and the configuration of the model that has only these.

Two layers are of one kind if they hold the same tensors, attend in the same way, and the same of it trains. A proof
keeps the first layer of each kind, and more until each pipeline stage can have one with experts.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from moe_dist.config.schema import TrainableSection
from moe_dist.errors import UserError
from moe_dist.models.skeleton import build_skeleton, make_config
from moe_dist.models.surgery import moe_layers
from moe_dist.moe.layer import MoEExperts
from moe_dist.train.trainable import Selection, layer_index

# Keys of transformers' configurations that list the indices of some layers.
INDEX_LISTS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices")
LEAST_MOE = 2  # layers with experts, so that what is exchanged between two of them shows


def layers_path(skeleton: nn.Module) -> str:
    """The path of the decoder layers in a model of transformers, as "model.layers"."""
    count = skeleton.config.get_text_config().num_hidden_layers
    paths = [
        name for name, module in skeleton.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    for path in paths:
        if any(isinstance(module, MoEExperts) for module in skeleton.get_submodule(path).modules()):
            return path
    if not paths:
        raise UserError(f"{type(skeleton).__name__}: its {count} decoder layers are not found, so it cannot be cut")
    return paths[0]


@dataclass(frozen=True)
class Layer:
    """What a decoder layer is to a proof. kind: equal for two layers of one kind. routed: whether it has experts.
    trains: whether something of it does."""

    kind: Hashable
    routed: bool
    trains: bool


def describe_layers(skeleton: nn.Module, selection: Selection) -> list[Layer]:
    """Each layer of `plan_model`'s skeleton."""
    path = layers_path(skeleton)
    attends = getattr(skeleton.config.get_text_config(), "layer_types", None) or ()
    found = []
    for index, layer in enumerate(skeleton.get_submodule(path)):
        prefix = f"{path}.{index}."
        experts = {name: module for name, module in layer.named_modules() if isinstance(module, MoEExperts)}
        tensors = {
            (name, tuple(parameter.shape), f"{prefix}{name}" in selection.names)
            for name, parameter in layer.named_parameters()
            if not any(name.startswith(f"{inside}.") for inside in experts)
        }
        tensors |= {
            (name, module.spec.num_experts, tuple(module.spec.shapes().items()), bool(selection.experts[prefix + name]))
            for name, module in experts.items()
        }
        attention = attends[index] if index < len(attends) else None
        found.append(Layer((frozenset(tensors), attention), bool(experts), any(tensor[-1] for tensor in tensors)))
    return found


def choices(layers: Sequence[Layer], *, stages: int) -> Iterator[list[int]]:
    """Indices of layers to keep, in order, fewest first: each kind once, a layer with experts for each stage, at least
    LEAST_MOE of those, and a layer for each stage, as far as there are so many. Further choices add layers that train,
    one after the other: each stage has to have one."""
    kept = set({layer.kind: index for index, layer in reversed(list(enumerate(layers)))}.values())
    everyone = range(len(layers))
    for wanted, candidates in (
        (max(stages, LEAST_MOE), [index for index in everyone if layers[index].routed]),
        (stages, everyone),
    ):
        for index in candidates:
            if len(kept & set(candidates)) >= wanted:
                break
            kept.add(index)
    yield sorted(kept)
    for index in everyone:
        if layers[index].trains and index not in kept:
            kept.add(index)
            yield sorted(kept)


def check_layers(kept: Sequence[int], count: int, *, stages: int) -> list[int]:
    """The layers that a user has named, in order. UserError for those that do not exist or do not suffice."""
    bad = [index for index in kept if not 0 <= index < count]
    if bad or len(set(kept)) != len(kept):
        raise UserError(f"--layers: {bad or list(kept)}: the model has the layers 0 to {count - 1}, name each once")
    if len(kept) < stages:
        raise UserError(f"--layers: {len(kept)} layers for parallel.pipeline={stages} stages; name at least {stages}")
    return sorted(kept)


def cut_to(config: PreTrainedConfig, kept: list[int]) -> tuple[list[int], PreTrainedConfig, list[str]]:
    """(layers, configuration, notes) of the model cut to `kept`; where the family's keys have no form for these, to all
    up to the last of them, which every family has."""
    try:
        return kept, *cut_config(config, kept)
    except UserError:
        kept = list(range(kept[-1] + 1))
        return kept, *cut_config(config, kept)


def cut_config(config: PreTrainedConfig, kept: Sequence[int]) -> tuple[PreTrainedConfig, list[str]]:
    """The configuration of the model with the layers `kept` alone, and what else is not as in the original: what draws
    random numbers in training is switched off. Raises UserError where the family's keys do not allow this choice."""
    values = config.to_dict()
    text = config.get_text_config()
    inner = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
    section = values if inner is None else values[inner]
    count = text.num_hidden_layers
    for key, value in list(section.items()):
        if key in INDEX_LISTS and value:
            section[key] = [kept.index(index) for index in value if index in kept]
        elif isinstance(value, list) and len(value) == count:
            section[key] = [value[index] for index in kept]
    section[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    if isinstance(section.get("first_k_dense_replace"), int):
        section["first_k_dense_replace"] = sum(index < section["first_k_dense_replace"] for index in kept)
    step = section.get("decoder_sparse_step") or 1
    if step > 1:
        section["decoder_sparse_step"] = 1
        dense = [place for place, index in enumerate(kept) if (index + 1) % step]
        section["mlp_only_layers"] = sorted({*dense, *(section.get("mlp_only_layers") or ())})
    notes = _without_chance(values)
    made = make_config(values, where=f"the model cut to layers {', '.join(map(str, kept))}")
    _check_same(config, made, kept)
    return made, notes


def _without_chance(values: dict) -> list[str]:
    """Set what draws random numbers to zero, in place; what was not."""
    notes = []
    for key, value in values.items():
        if isinstance(value, dict):
            notes += _without_chance(value)
        elif isinstance(value, float) and value and ("dropout" in key or "jitter" in key or key == "layerdrop"):
            values[key] = 0.0
            notes.append(f"{key} is 0 here, and {value:g} in training: two processes draw other numbers")
    return notes


def _check_same(config: PreTrainedConfig, made: PreTrainedConfig, kept: Sequence[int]) -> None:
    """UserError unless the layers of the cut model have the very tensors of those that they stand for."""
    before, after = (build_skeleton(one, torch.float32) for one in (config, made))
    path = layers_path(before)
    for place, index in enumerate(kept):
        old, new = before.get_submodule(f"{path}.{index}"), after.get_submodule(f"{path}.{place}")
        shapes = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in (old, new)]
        if shapes[0] != shapes[1]:
            first = kept[-1] + 1
            raise UserError(
                f"the configuration of {config.model_type} has no form in which layer {index} comes as number {place}. "
                f"Keep all layers up to the last one that matters: --layers {','.join(map(str, range(first)))}"
            )


def cut_selection(skeleton: nn.Module, selection: Selection, kept: Sequence[int]) -> TrainableSection:
    """The section that selects in the cut model what `selection` does in the whole one, name for name."""
    path = layers_path(skeleton)
    inside = re.compile(re.escape(path) + r"\.(\d+)\.(.+)")

    def renamed(name: str) -> str | None:
        found = inside.fullmatch(name)
        if found is None:
            return name
        index = int(found.group(1))
        return f"{path}.{kept.index(index)}.{found.group(2)}" if index in kept else None

    include = sorted(filter(None, map(renamed, selection.names)))
    experts = {}
    for name, layer in moe_layers(skeleton):
        new, ids = renamed(name), selection.experts[name]
        if new is not None and ids:
            include += [f"{new}.{tensor}" for tensor in layer.spec.shapes()]
            experts[str(layer_index(new))] = list(ids)
    if not include:
        raise UserError("--layers: nothing of these layers trains, so there is nothing to prove; name others")
    return TrainableSection(include=include, experts=experts)
