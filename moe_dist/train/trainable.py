"""What trains: from `trainable:` in the configuration to a set of names and expert ids, and the table of it.

Patterns are globs over parameter names as transformers has them in memory; the experts of a layer count as the names
`<layer>.gate_up_proj` and so on, and train whole or not at all. `experts` narrows the layers' experts by global id;
`shared_experts` and `non_expert_modules`, where false, freeze what the patterns match of the two groups.
A pattern that matches nothing is an error: it would freeze or train something else than its author believes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from moe_dist.config.schema import TrainableSection
from moe_dist.errors import UserError
from moe_dist.moe.layer import MoEExperts


@dataclass(frozen=True)
class Selection:
    """`names`: parameters outside the experts that train. `experts`: layer name -> global ids that train."""

    names: frozenset[str]
    experts: dict[str, tuple[int, ...]]


def select(section: TrainableSection, model: nn.Module, routers: list[str]) -> Selection:
    """Resolve the section against a model whose experts are `MoEExperts` (on any device, meta included).

    `routers`: module names of the routers, for `freeze_router`. Raises UserError for patterns, layers or ids that do
    not exist, for patterns that split an expert, and where nothing at all would train.
    """
    assert section.experts_file is None, "the expert config is read when the configuration is loaded"
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoEExperts)}
    inside = {f"{layer}.{span}." for layer in layers for span in ("trainable", "frozen")}
    dense = [name for name, _ in model.named_parameters() if not any(name.startswith(prefix) for prefix in inside)]
    expert_names = {layer: [f"{layer}.{name}" for name in module.spec.shapes()] for layer, module in layers.items()}
    everything = dense + [name for names in expert_names.values() for name in names]
    exclude = list(section.exclude)
    if section.freeze_router:
        exclude += [f"{router}.*" for router in routers]
    chosen = _matching(section.include, everything, "trainable.include")
    chosen -= _matching(exclude, everything, "trainable.exclude")

    experts: dict[str, tuple[int, ...]] = {}
    for layer, names in expert_names.items():
        hit = chosen & set(names)
        if hit and hit != set(names):
            left = ", ".join(sorted(set(names) - hit))
            raise UserError(f"trainable: an expert trains whole or not at all, but the patterns leave out {left}")
        experts[layer] = tuple(range(layers[layer].spec.num_experts)) if hit else ()
    if section.experts is not None:
        experts = _narrow(experts, section.experts, layers)
    allowed = {True: section.shared_experts, False: section.non_expert_modules}
    names = frozenset(name for name in dense if name in chosen and allowed[is_shared_expert(name)])
    selection = Selection(names, experts)
    if not selection.names and not any(experts.values()):
        raise UserError(
            "trainable: nothing would train; widen trainable.include or trainable.experts, or give the expert config "
            "of `esft select` as trainable.experts_file"
        )
    return selection


def freeze(model: nn.Module, selection: Selection) -> None:
    """Set requires_grad of every parameter outside the experts (those carry it since they were placed)."""
    copies = getattr(model, "tied_copies", {})  # of what the selection knows under another name, see `models.stages`
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "is_expert", False):
            parameter.requires_grad_(copies.get(name, name) in selection.names)


def layer_index(name: str) -> int | None:
    """The number of the decoder layer that a module or parameter name lies in."""
    found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def is_shared_expert(name: str) -> bool:
    """Whether a parameter belongs to the experts that every token goes through, their gate included."""
    return re.search(r"(?:^|\.)shared_(?:experts?|expert_gate|mlp)\.", name) is not None


def _matching(patterns: list[str], names: list[str], key: str) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        hit = {name for name in names if fnmatchcase(name, pattern)}
        if not hit:
            near = ", ".join(names[:3])
            raise UserError(f"{key}: {pattern!r} matches no parameter; names look like {near}, ...")
        chosen |= hit
    return chosen


def _narrow(
    matched: dict[str, tuple[int, ...]], wanted: dict[str, list[int]], layers: dict[str, MoEExperts]
) -> dict[str, tuple[int, ...]]:
    by_index = {str(layer_index(layer)): layer for layer in layers}
    unknown = sorted(set(wanted) - set(by_index))
    if unknown:
        raise UserError(
            f"trainable.experts: layer(s) {', '.join(unknown)} have no experts; "
            f"layers with experts are {', '.join(sorted(by_index, key=lambda i: (len(i), i)))}"
        )
    narrowed = dict.fromkeys(matched, ())
    for index, ids in wanted.items():
        layer = by_index[index]
        bad = sorted(set(ids) - set(range(layers[layer].spec.num_experts)))
        if bad:
            raise UserError(
                f"trainable.experts.{index}: no experts {bad}; "
                f"the layer has experts 0 to {layers[layer].spec.num_experts - 1}"
            )
        if ids and not matched[layer]:
            raise UserError(f"trainable.experts.{index} names experts that trainable.include or exclude freezes")
        narrowed[layer] = tuple(sorted(set(ids)))
    return narrowed
