"""The router tap: reads what the routers of a model say during a forward, and turns it into losses.

    tap = RouterTap(sites)
    tap.start_step()                       # once an optimizer step
    with tap:                              # once a micro-batch
        output = model(...)
    losses = tap.loss_share("layer_global", coef=0.01, z_coef=0.0, mask_BL=mask_BL, grid=grid)
    total = language_model_loss + losses.share / number_of_micro_batches

Routers are transformers' own; the tap only listens, by forward hooks, while it is open. Activation recomputation runs
a router again in the backward: the tap is closed then, and nothing is seen twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from moe_dist.errors import UserError
from moe_dist.moe import balance
from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import Grid

FORMS = ("hf", "layer_micro", "layer_sequence", "layer_global")


@dataclass(frozen=True)
class RouterSite:
    """One layer's router and its experts.

    name: path of the router in the model. score: "softmax" or "sigmoid", None where unknown. outputs: what the
    router's forward returns, in order; "logits" and "ids" must be among them. bias_name: the router's buffer `[E]`
    that is added to the scores for the choice of experts only, None where the family has none.
    """

    name: str
    router: nn.Module
    experts: MoEExperts
    score: str | None = "softmax"
    outputs: tuple[str, ...] = ("logits", "weights", "ids")
    bias_name: str | None = None

    @property
    def bias(self) -> torch.Tensor:
        """The buffer as it is now: moving or casting a model puts another tensor in its place."""
        return self.router.get_buffer(self.bias_name)

    @property
    def trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.router.parameters())


class RouterLosses(NamedTuple):
    """share: what this rank adds to its loss, coefficients applied, with gradient. balance, z: the shares before their
    coefficients, without gradient, for the metrics: summed over ranks they are the losses. hf: where `hf` is on and
    the layers lie on several pipeline stages, what this stage has to do with it, which is then in none of the others.
    """

    share: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor
    hf: balance.HfParts | None = None


class RouterTap:
    """Listens to the routers of `sites` (in order of depth) inside `with tap:`.

    Under ZeRO 3 make it after the engine: hooks run in order of registration, and the engine's own must have marked
    the outputs by which it knows in the backward that a router's weight is needed again.
    routers: how many the model has, where others are on other pipeline stages.
    """

    def __init__(self, sites: list[RouterSite], *, routers: int | None = None):
        self.sites, self.routers = sites, routers or len(sites)
        self._open = False
        self._seen: dict[int, balance.RouterOutput] = {}
        self._step = balance.StepLoad()
        for index, site in enumerate(sites):
            site.router.register_forward_hook(self._listener(index, site))

    def __enter__(self) -> RouterTap:
        self._seen, self._open = {}, True
        return self

    def __exit__(self, *exception) -> None:
        self._open = False

    def start_step(self) -> None:
        """Begin an optimizer step: `layer_global` forgets the load of the last one."""
        self._step = balance.StepLoad()

    def loss_share(
        self,
        form: str = "none",
        *,
        coef: float | None = None,
        z_coef: float | None = None,
        mask_BL: torch.Tensor,
        grid: Grid,
        position_ids_BL: torch.Tensor | None = None,
    ) -> RouterLosses:
        """Losses of the last forward inside `with tap:`, which are then forgotten. Collective where anything is on.

        form: one of `FORMS` or "none". coef, z_coef: factors; None and 0 are off. mask_BL: of whole rows, nonzero =
        real token. position_ids_BL: see `RealTokens.count`. Raises UserError for an unknown form or score.
        """
        if form != "none" and form not in FORMS:
            raise UserError(f"moe.balance_loss={form}: expected none, {', '.join(FORMS)}")
        missed = [site.name for index, site in enumerate(self.sites) if index not in self._seen]
        assert not missed, f"no forward inside the tap, or it did not reach {', '.join(missed)}"
        layers = [self._seen[index] for index in range(len(self.sites))]
        self._seen = {}
        for site, layer in zip(self.sites, layers, strict=True):
            lost = torch.is_grad_enabled() and site.trains and not layer.logits_TE.requires_grad
            assert not lost, f"{site.name}: its logits have no graph, the router would get no gradient"
        zero = torch.zeros((), device=mask_BL.device)
        balance_on, z_on = form != "none" and bool(coef), bool(z_coef)
        if not balance_on and not z_on:
            return RouterLosses(zero, zero, zero)

        tokens = balance.RealTokens.count(mask_BL, grid, position_ids_BL=position_ids_BL)
        parts = None
        if balance_on and form == "hf" and grid.pipeline > 1:
            parts, balance_on = balance.hf_parts(layers, tokens, grid, routers=self.routers), False
        balanced = self._balance(form, layers, tokens, grid) if balance_on else zero
        z = balance.z_loss(layers, tokens) if z_on else zero
        return RouterLosses((coef or 0) * balanced + (z_coef or 0) * z, balanced.detach(), z.detach(), parts)

    def _balance(self, form: str, layers: list, tokens: balance.RealTokens, grid: Grid) -> torch.Tensor:
        if form == "layer_global":
            return balance.layer_global(layers, tokens, grid, self._step)
        return getattr(balance, form)(layers, tokens, grid)

    def _listener(self, index: int, site: RouterSite):
        logits_at, ids_at = site.outputs.index("logits"), site.outputs.index("ids")

        def listen(router: nn.Module, inputs: tuple, output: tuple) -> None:
            if not self._open:
                return
            assert index not in self._seen, f"{site.name} ran twice in one forward"
            logits, ids = output[logits_at], output[ids_at]
            self._seen[index] = balance.RouterOutput(
                logits.flatten(0, -2), ids.flatten(0, -2), score=site.score, name=site.name
            )

        return listen


def double_balance_warning(sites: list[RouterSite], form: str, coef: float | None) -> str | None:
    """What to tell a user whose model is balanced by a bias and gets a balance loss too; None where nothing is odd."""
    biased = [site.name for site in sites if site.bias_name is not None]
    if not biased or form == "none" or not coef:
        return None
    return (
        f"this model balances its experts by a bias ({biased[0]}, ...), and moe.balance_loss={form} with coefficient "
        f"{coef:g} pushes on the same router. DeepSeek-V3 itself adds only layer_sequence with 1e-4; "
        "set moe.balance_loss=none to leave balancing to moe.expert_bias_rate"
    )
