"""What one rank holds: the parameters of each part of its model, from the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from moe_dist.train.family import EXPERT, FAMILIES, family_of
from moe_dist.train.trainable import layer_index

EMBEDDING, HEAD = "embedding", "head"


@dataclass(frozen=True)
class Weight:
    """A parameter of one rank. elements: as the rank holds it before ZeRO. decays: whether weight decay applies."""

    elements: int
    family: str
    trained: bool
    decays: bool


Inventory = Mapping[str | int, tuple[Weight, ...]]


def inventory(model: nn.Module) -> Inventory:
    """The parameters of the embedding, of each decoder layer by its index, and of all the rest (head)."""
    embedding = model.get_input_embeddings()
    first = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    parts: dict[str | int, list[Weight]] = {}
    for name, parameter in model.named_parameters():
        index = layer_index(name)
        part = index if index is not None else EMBEDDING if id(parameter) in first else HEAD
        family = family_of(parameter)
        decays = parameter.dim() - (family == EXPERT) >= 2
        weight = Weight(parameter.numel(), family, parameter.requires_grad, decays)
        parts.setdefault(part, []).append(weight)
    return {part: tuple(weights) for part, weights in parts.items()}


@dataclass(frozen=True)
class Totals:
    """Elements of one rank by family: all, and those that train; `groups`: trained ones by optimizer group, `largest`
    the largest single parameter that trains."""

    held: Mapping[str, int]
    trained: Mapping[str, int]
    groups: Mapping[tuple[str, bool], int]
    largest: int


def totals(weights: Iterable[Weight]) -> Totals:
    held, trained = dict.fromkeys(FAMILIES, 0), dict.fromkeys(FAMILIES, 0)
    groups: dict[tuple[str, bool], int] = {}
    largest = 0
    for weight in weights:
        held[weight.family] += weight.elements
        if weight.trained:
            trained[weight.family] += weight.elements
            key = weight.family, weight.decays
            groups[key] = groups.get(key, 0) + weight.elements
            largest = max(largest, weight.elements)
    return Totals(held, trained, groups, largest)
