"""What the loop has to do with routing: padding masks, balance losses, expert bias, and figures for the metrics."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.config.schema import MoeSection
from moe_dist.models.routers import router_sites
from moe_dist.models.surgery import moe_layers
from moe_dist.moe.balance import HfParts
from moe_dist.moe.expert_bias import ExpertBias, biased
from moe_dist.moe.router_tap import RouterLosses, RouterTap, double_balance_warning
from moe_dist.moe.statistics import LoadStatistics, rank_load_max, summarise
from moe_dist.parallel.grid import Grid
from moe_dist.train.rows import Rows
from moe_dist.train.trainable import layer_index


def check_routing(settings: MoeSection, model: nn.Module) -> None:
    """Raise UserError where the model, which may be on the meta device, lacks what a loss or the expert bias needs."""
    if _loss_on(settings) or settings.z_loss_coef or settings.expert_bias_rate:
        sites = router_sites(model)
        if settings.expert_bias_rate:
            biased(sites)


def _loss_on(settings: MoeSection) -> bool:
    return settings.balance_loss != "none" and settings.balance_coef > 0


class Routing:
    """Make it after the engine (see `RouterTap`). Collective.

    Of several pipeline stages each has the routers of its own layers, maybe none; figures are those of all stages.
    """

    def __init__(self, model: nn.Module, settings: MoeSection, grid: Grid):
        self.settings, self.grid = settings, grid
        self.layers = moe_layers(model)
        loss_on, rate = _loss_on(settings), settings.expert_bias_rate
        experts = of_all_stages({name: layer.spec.num_experts for name, layer in self.layers}, grid)
        sites = []
        if (loss_on or settings.z_loss_coef or rate) and (self.layers or not experts):
            sites = router_sites(model)  # which refuses a dense model; a dense stage just has none
        self.tap = RouterTap(sites, routers=len(experts)) if loss_on or settings.z_loss_coef else None
        self.bias = ExpertBias(sites, rate=rate, grid=grid) if rate and sites else None
        self.num_experts = max(experts.values(), default=0)
        self.hf_on = loss_on and settings.balance_loss == "hf"
        self._window = {name: LoadStatistics(layer.spec.num_experts) for name, layer in self.layers}
        self.window_steps = 0
        warning = double_balance_warning(sites, settings.balance_loss, settings.balance_coef)
        if not loss_on and not rate and _learns_to_choose_one(model):
            warning = (
                "a token has one expert and there is no balance loss: an expert that gets no tokens has no gradient, "
                "and will get none. Set moe.balance_loss and a moe.balance_coef above 0"
            )
        self._warning = next(filter(None, of_all_stages({grid.pipeline_rank: warning}, grid).values()), None)

    def announce(self) -> list[str]:
        """Which routing losses are on, in words: a loss that is silently on or off has cost people whole runs."""
        settings = self.settings
        lines = [
            f"balance loss {settings.balance_loss} with coefficient {settings.balance_coef:g}, "
            f"z-loss coefficient {settings.z_loss_coef:g}"
            if self.tap
            else "no balance loss and no z-loss",
            "dropless"
            if settings.capacity_factor is None
            else f"capacity factor {settings.capacity_factor:g}: slots beyond it are dropped and counted",
        ]
        if settings.expert_bias_rate:
            lines.append(f"expert bias moves by {settings.expert_bias_rate:g} a step")
        return lines + ([f"warning: {self._warning}"] if self._warning else [])

    def start_step(self) -> None:
        for _, layer in self.layers:
            layer.statistics.reset()
        if self.tap:
            self.tap.start_step()

    def see(self, real_BS: torch.Tensor) -> None:
        """Tell the experts which tokens of this rank's slice are real in the coming forward, and not padding."""
        real_T = real_BS.flatten()
        for _, layer in self.layers:
            layer.token_mask_T = real_T

    def listening(self) -> contextlib.AbstractContextManager:
        """The context of a training forward whose `loss_share` is wanted."""
        return self.tap or contextlib.nullcontext()

    def loss_share(self, rows: Rows) -> torch.Tensor:
        """This rank's share of the routing losses of the last forward, coefficients applied (see `moe.balance`)."""
        losses = self.losses(rows)
        assert losses.hf is None, "hf over pipeline stages is not the share of one of them"
        return losses.share

    def losses(self, rows: Rows) -> RouterLosses:
        """The same in parts, for pipeline stages: with `hf`, `share` has the z-loss alone, and `hf` this stage's sums,
        to which `moe.balance_coef` is not applied."""
        if self.tap is None or not self.layers:
            zero = torch.zeros((), device=self.grid.device)
            parts = None
            if self.hf_on:
                none_E = zero.expand(self.num_experts)
                parts = HfParts(none_E, none_E.long(), zero.double())
            return RouterLosses(zero, zero, zero, parts)
        return self.tap.loss_share(
            self.settings.balance_loss,
            coef=self.settings.balance_coef,
            z_coef=self.settings.z_loss_coef,
            mask_BL=rows.batch["attention_mask"],
            grid=self.grid,
            position_ids_BL=rows.batch["position_ids"],
        )

    def end_step(self, *, skipped: bool) -> None:
        for name, layer in self.layers:
            if layer.statistics.counts_E is not None:
                self._window[name].add(layer.statistics.counts_E, layer.statistics.dropped)
        self.window_steps += 1
        if self.bias:
            if skipped:
                self.bias.discard()
            else:
                self.bias.step()

    def figures(self) -> dict:
        """Load figures of the last step over all ranks: the worst over layers, and each layer's; of a dense model there
        are none. Collective."""
        mine = {}
        for name, layer in self.layers:
            total = layer.statistics.total(self.grid.stage_group, self.grid.device).cpu()
            mine[str(layer_index(name))] = summarise(total), rank_load_max(total, layer.placement.fractions)
        every = of_all_stages(mine, self.grid)
        if not every:
            return {}
        layers = {index: figures for index, (figures, _) in every.items()}
        return {
            "load_max": max(layer["load_max"] for layer in layers.values()),
            "rank_load_max": max(of_rank for _, of_rank in every.values()),
            "load_entropy": min(layer["load_entropy"] for layer in layers.values()),
            "dead_experts": sum(layer["dead"] for layer in layers.values()),
            "dropped": max(layer["dropped"] for layer in layers.values()),
            "layers": layers,
        }

    def window(self) -> dict:
        """What each expert got since the last call, over all ranks, and of how many steps. Collective.

        counts: {layer index: [slots of each expert]}; dropped: {layer index: slots that capacity left out}.
        """
        totals = {
            str(layer_index(name)): self._window[name].total(self.grid.stage_group, self.grid.device).tolist()
            for name, _ in self.layers
        }
        totals = of_all_stages(totals, self.grid)
        steps, self.window_steps = self.window_steps, 0
        for statistics in self._window.values():
            statistics.reset()
        return {
            "steps": steps,
            "counts": {layer: total[:-1] for layer, total in totals.items()},
            "dropped": {layer: total[-1] for layer, total in totals.items()},
        }


def of_all_stages(mine: dict, grid: Grid) -> dict:
    """The entries of all pipeline stages, in order of depth; small things only. Collective over the pipeline group."""
    if grid.pipeline_group is None:
        return mine
    told = [mine] * grid.pipeline
    dist.all_gather_object(told, mine, group=grid.pipeline_group)
    return {key: value for stage in told for key, value in stage.items()}


def _learns_to_choose_one(model: nn.Module) -> bool:
    """Whether a router that trains sends each token to one of several experts."""
    if getattr(model.config.get_text_config(), "num_experts_per_tok", None) != 1:
        return False
    routers = [layer.origin.router for _, layer in moe_layers(model) if layer.spec.num_experts > 1]
    found = [model.get_submodule(path) for path, _ in filter(None, routers)]
    return any(parameter.requires_grad for router in found for parameter in router.parameters())
