"""Where the routers of a swapped model are, for the balance losses and the expert bias."""

from __future__ import annotations

from torch import nn

from moe_dist.errors import UserError
from moe_dist.models.families import HOW_TO_ADD
from moe_dist.models.surgery import moe_layers
from moe_dist.moe.router_tap import RouterSite


def router_sites(model: nn.Module) -> list[RouterSite]:
    """The router of every experts layer of ours in `model`, in order of depth.

    Raises UserError where a layer's router was not found: a loss that is silently off in one layer would be worse.
    """
    if not moe_layers(model):
        raise UserError(
            "balance losses, z-loss and expert bias need routers, and this model is dense: leave them out of moe"
        )
    sites = []
    for name, layer in moe_layers(model):
        if layer.origin.router is None:
            raise UserError(f"{name}: its router was not found; balance losses and expert bias need it. {HOW_TO_ADD}")
        path, family = layer.origin.router
        router = model.get_submodule(path)
        sites.append(RouterSite(path, router, layer, family.score, family.outputs, family.correction_bias))
    return sites
