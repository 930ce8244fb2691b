"""Adapters on a model in memory: load, unload, swap. Base weights come back to the bit.

    load_adapter(model, "adapters/intent")
    load_adapter(model, "adapters/law")          # an error if the two share an expert
    unload_adapter(model, "adapters/intent")     # in any order
    swap_adapter(model, "adapters/law", "adapters/summary")

A model has a single set of weights, so two adapters that hold the same expert cannot both be in force. `overlap` says
what happens: "error" refuses; "last" lets the one loaded last win, and gives the expert back to the other one when
that one is unloaded. Nothing is ever averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moe_dist.errors import UserError
from moe_dist.methods.esft.adapter_folder import Adapter, Base, find_base, open_adapter
from moe_dist.methods.esft.adapter_names import AdapterNames, ExpertTensor, check_whole, expert_views
from moe_dist.models.families import our_name

OVERLAPS = ("error", "last")
STATE = "esft_adapters"  # attribute of the model
_SHOWN = 8

Place = ExpertTensor | str


@dataclass
class Loaded:
    """The adapters in a model, the last loaded last, and the base weights that they have replaced (on the CPU)."""

    adapters: dict[Path, Adapter] = field(default_factory=dict)
    originals: dict[Place, torch.Tensor] = field(default_factory=dict)


def load_adapter(
    model: PreTrainedModel, folder: str | Path, *, overlap: str = "error", base: str | Path | None = None
) -> None:
    """Put an adapter's weights in place of the base model's, rounded to the model's dtype.

    model: from `load_model` (each rank of a grid calls it, and takes what it holds) or plain transformers.
    base: the folder that the model was loaded from, where the model does not say it itself.
    Raises UserError, with the model untouched, for an adapter that is damaged, does not fit, was made for another
    base, is loaded already, or shares an expert with one that is (see `overlap`).
    """
    _swap(model, None, Path(folder), overlap=overlap, base=base)


def unload_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Take an adapter out again: its experts get the weights of the base, or of an adapter below it ("last")."""
    _swap(model, Path(folder), None, overlap="last", base=None)


def swap_adapter(
    model: PreTrainedModel,
    old: str | Path,
    new: str | Path,
    *,
    overlap: str = "error",
    base: str | Path | None = None,
) -> None:
    """Unload one adapter and load another; the model is untouched where the new one cannot be loaded."""
    _swap(model, Path(old), Path(new), overlap=overlap, base=base)


def check_overlap(adapters: Iterable[Adapter], overlap: str) -> None:
    """UserError for an unknown policy, and with "error" for two adapters that hold the same expert or tensor."""
    if overlap not in OVERLAPS:
        raise UserError(f"overlap={overlap!r}: has to be one of {', '.join(OVERLAPS)}")
    if overlap == "last":
        return
    owner: dict[str, Path] = {}
    for adapter in adapters:
        held = [f"layer {layer} expert {expert}" for layer, ids in adapter.config.experts.items() for expert in ids]
        held += sorted(adapter.dense_names())
        shared = [what for what in held if what in owner]
        if shared:
            more = f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
            raise UserError(
                f"{owner[shared[0]]} and {adapter.folder} both hold {', '.join(shared[:_SHOWN])}{more}, and a model "
                "has one set of weights. Use one of them at a time, or let the last one win with overlap 'last'"
            )
        owner |= dict.fromkeys(held, adapter.folder)


@torch.no_grad()
def _swap(model: PreTrainedModel, old: Path | None, new: Path | None, *, overlap: str, base: str | Path | None) -> None:
    loaded: Loaded = getattr(model, STATE, None) or Loaded()
    stack, names = dict(loaded.adapters), AdapterNames.of(model)
    touched: set[Place] = set()
    if old is not None:
        if old.resolve() not in stack:
            known = ", ".join(str(adapter.folder) for adapter in stack.values()) or "none"
            raise UserError(f"{old} is not loaded in this model; loaded: {known}")
        touched |= _places(stack.pop(old.resolve()))
    if new is not None:
        if new.resolve() in stack:
            raise UserError(f"{new} is loaded already")
        adapter = open_adapter(new, names)
        adapter.check_base(Base(Path(base)) if base is not None else find_base(model))
        check_overlap([*stack.values(), adapter], overlap)
        stack[new.resolve()] = adapter
        touched |= _places(adapter)

    places = {place: view for place, view in _views(model, names).items() if place in touched}
    # Everything is read before anything is written. What no adapter holds any more gets its original back.
    values = dict(loaded.originals)
    values |= {place: view.to("cpu", copy=True) for place, view in places.items() if place not in values}
    originals = {place: values[place] for place in {*loaded.originals, *places}}
    for adapter in stack.values():
        with adapter.files:
            values |= _values(adapter, places)
    for place, view in places.items():
        view.copy_(values[place])
    held = set().union(*map(_places, stack.values())) if stack else set()
    loaded = Loaded(stack, {place: tensor for place, tensor in originals.items() if place in held})
    setattr(model, STATE, loaded)


def _places(adapter: Adapter) -> set[Place]:
    return {*adapter.experts, *adapter.dense_names()}


def _values(adapter: Adapter, places: Mapping[Place, torch.Tensor]) -> dict[Place, torch.Tensor]:
    """What the adapter has for these places."""
    found: dict[Place, torch.Tensor] = {
        tensor: adapter.expert(tensor) for tensor in adapter.experts if tensor in places
    }
    if adapter.dense:
        found |= {name: tensor for name, tensor in adapter.others() if name in places}
    return found


def _views(model: PreTrainedModel, names: AdapterNames) -> dict[Place, torch.Tensor]:
    """Every tensor of the model that an adapter could hold; of experts those on this rank."""
    views: dict[Place, torch.Tensor] = dict(expert_views(model))
    state = model.state_dict(keep_vars=True)
    for name in (name for group in names.plan.dense for name in group.names()):
        tensor = state[our_name(name, names.descriptions)]
        check_whole(name, tensor)
        views[name] = tensor.data
    return views
