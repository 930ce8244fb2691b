"""Surgery: our experts layer in place of every experts module of a transformers model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from moe_dist.errors import UserError
from moe_dist.models.families import ExpertsDescription, describe_experts, unknown_family
from moe_dist.models.mixse.install import install
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import Placement, contiguous, from_lists
from moe_dist.parallel.grid import Grid

Trainable = Mapping[str, Iterable[int]] | None
Seating = str | Mapping[str, Placement | Sequence[Sequence[int]]]


def moe_layers(model: nn.Module) -> list[tuple[str, MoEExperts]]:
    """(path, layer) of every experts layer of ours in `model`, in order of depth."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoEExperts)]


def swap(
    model: nn.Module,
    grid: Grid,
    *,
    trainable: Trainable = None,
    placement: Seating = "contiguous",
    device: torch.device | str | None = None,
    dense: bool = False,
) -> list[tuple[str, MoEExperts]]:
    """Replace the experts modules of a stock `model` (usually on the meta device) by ours, whose weights are zero.

    trainable: layer path -> ids of the experts that train, other layers frozen; None trains all.
    placement: "contiguous", or layer path -> the expert ids of each rank, or a `Placement` for what is to be said
    beyond that; layers left out are contiguous.
    device: of the new weights, the grid's unless told. Each layer gets the dtype of the module it replaces and keeps
    that module's `ExpertsDescription` as `.origin`.
    dense: a model without any such module is left as it is. A MiXSE model, which has none, gets its LoRA experts.
    Raises UserError where the model has no such module, or a path or an expert id does not exist.
    """
    device = grid.device if device is None else device
    mixture = install(model, device)
    descriptions = describe_experts(model)
    if not descriptions and not dense and mixture is None:
        raise unknown_family(getattr(model.config, "model_type", None))
    names = [description.name for description in descriptions]
    seats = _seats_by_layer(placement)
    for what, given in (("trainable", trainable or {}), ("placement", seats)):
        for name in given:
            if name not in names:
                raise UserError(f"{what}: there is no MoE layer {name!r}; layers are {', '.join(names)}")
    for description in descriptions:
        name = description.name
        ids = None if trainable is None else trainable.get(name, ())
        layer = MoEExperts(
            description.spec,
            _place(description, seats.get(name), grid.expert, ids),
            grid,
            dtype=model.get_parameter(description.stock_name("down_proj")).dtype,
            device=device,
            post_norm=description.post_norm,
        )
        layer.origin = description
        model.set_submodule(name, layer)
    return moe_layers(model)


def _seats_by_layer(placement: Seating) -> Mapping[str, Placement | Sequence[Sequence[int]]]:
    if isinstance(placement, str):
        if placement != "contiguous":
            raise UserError(f"placement {placement!r}: expected 'contiguous' or lists of expert ids by layer")
        return {}
    return placement


def _place(
    description: ExpertsDescription,
    given: Placement | Sequence[Sequence[int]] | None,
    ranks: int,
    trainable: Iterable[int] | None,
) -> Placement:
    count = description.spec.num_experts
    if given is None:
        return contiguous(count, ranks=ranks, trainable=trainable)
    lists = given.ranks if isinstance(given, Placement) else given
    if len(lists) != ranks:
        raise UserError(f"placement of {description.name}: {len(lists)} lists for {ranks} expert-parallel ranks")
    train = frozenset(range(count) if trainable is None else trainable)
    if not isinstance(given, Placement):
        return from_lists(lists, num_experts=count, trainable=train)
    if (given.num_experts, given.trainable) != (count, train):
        raise UserError(
            f"placement of {description.name}: made for {given.num_experts} experts, of which "
            f"{sorted(given.trainable)} train; there are {count}, of which {sorted(train)} do"
        )
    return given
