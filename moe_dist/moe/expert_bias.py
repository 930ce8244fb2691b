"""Balancing by expert bias, as DeepSeek-V3 does: no loss, but a nudge after each optimizer step.

The router adds a bias to its scores to *choose* experts, not to weigh them. After a step, every expert that got more
than the mean load loses `rate` from its bias, every other one with less gains it:

    bias_i += rate · sign(mean_j load_j − load_i)

Loads are those of the whole step: all micro-batches, all ranks of the stage, real tokens only, as chosen (before
any capacity limit). The sign is taken of integers, so that all ranks compute the very same bits.
"""

from __future__ import annotations

from functools import partial

import torch

from moe_dist.errors import UserError
from moe_dist.moe.balance import count_slots
from moe_dist.moe.router_tap import RouterSite
from moe_dist.parallel.collectives import sum_over
from moe_dist.parallel.grid import Grid


def biased(sites: list[RouterSite]) -> list[RouterSite]:
    """Those whose router has a balancing bias; UserError where none has."""
    found = [site for site in sites if site.bias_name is not None]
    if not found:
        raise UserError("moe.expert_bias_rate: the routers of this model have no balancing bias; set it to 0")
    return found


class ExpertBias:
    """Counts the load of each layer while the model trains, and updates the routers' biases.

    Padding must be marked for the experts layers (`token_mask_T`). Layers whose router is frozen (nothing in it
    requires grad) keep their bias; forwards in eval mode do not count. The biases are buffers of the model, float32,
    changed in place: they are saved and loaded with it.
    Raises UserError where no router of `sites` has such a bias.
    """

    def __init__(self, sites: list[RouterSite], *, rate: float, grid: Grid):
        self.sites = [site for site in biased(sites) if site.trains]
        self.rate, self.grid = rate, grid
        self.discard()
        for index, site in enumerate(self.sites):
            site.experts.recorders.append(partial(self._count, index))

    def discard(self) -> None:
        """Forget the load counted so far: the optimizer step was skipped."""
        self._loads = [
            torch.zeros(site.experts.spec.num_experts, dtype=torch.int64, device=site.bias.device)
            for site in self.sites
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Update the biases by the load since the last call, after the optimizer's step. Collective."""
        if not self.sites:
            return
        loads = sum_over(torch.cat(self._loads), self.grid.stage_group).split([len(load_E) for load_E in self._loads])
        for site, load_E in zip(self.sites, loads, strict=True):
            bias = site.bias
            assert bias.dtype == torch.float32, f"{site.name}: the bias is {bias.dtype}, its small steps would be lost"
            towards_mean_E = torch.sign(load_E.sum() - len(load_E) * load_E)
            bias.add_(towards_mean_E.to(bias.dtype).view_as(bias), alpha=self.rate)
        self.discard()

    def _count(self, index: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        if self.sites[index].experts.training:
            self._loads[index] += count_slots(ids_TK, len(self._loads[index]))
