"""AdamW: its parameter groups, and a variant that keeps fp32 masters of low-precision parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from moe_dist.train.family import EXPERT, FAMILIES, family_of


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict]:
    """Optimizer groups of the parameters that train: families × {with, without decay}, empty ones left out.

    Only matrices decay: norms and biases do not. A stack of experts counts as what one expert holds, so the stacked
    biases `[S,F]` do not decay either. Groups and their order depend on names and shapes alone, so they are the same
    on every rank of a pipeline stage. Each group is a dict of params, weight_decay and `family` (see `train.family`).
    """
    groups = {
        (family, decays): {"params": [], "weight_decay": weight_decay if decays else 0.0, "family": family}
        for family in FAMILIES
        for decays in (True, False)
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            family = family_of(parameter)
            groups[family, parameter.dim() - (family == EXPERT) >= 2]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


class MasterAdamW(torch.optim.AdamW):
    """AdamW over fp32 masters, for where no ZeRO optimizer keeps them: replicated parameters.

    A parameter in fp32 is its own master. For any other dtype the master is an fp32 copy, the gradients of all
    micro-batches are summed in fp32 on it, and `step` rounds the new master into the parameter.

    `masters`: parameter -> master, in the order of the groups.
    """

    def __init__(self, groups: Iterable[dict], **hyper):
        self.masters: dict[nn.Parameter, torch.Tensor] = {}
        self._hooks = []
        own = []
        for group in groups:
            params = [self._master_of(parameter) for parameter in group["params"]]
            own.append({**group, "params": params})
        super().__init__(own, **hyper)

    def _master_of(self, parameter: nn.Parameter) -> torch.Tensor:
        master = parameter
        if parameter.dtype != torch.float32:
            master = parameter.detach().float().requires_grad_()
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._collect))
        self.masters[parameter] = master
        return master

    def _collect(self, parameter: nn.Parameter) -> None:
        master = self.masters[parameter]
        if master.grad is None:
            master.grad = torch.empty_like(master).copy_(parameter.grad)
        else:
            master.grad += parameter.grad
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One AdamW step on the masters; the parameters follow, the gradients are dropped."""
        assert closure is None
        super().step()
        self.publish()
        self.zero_grad(set_to_none=True)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters."""
        for parameter, master in self.masters.items():
            if master is not parameter:
                parameter.copy_(master)

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()


def create_state(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> None:
    """Give AdamW its state for `flat` as it would be before the first step: moments of zero, zero steps."""
    if not optimizer.state[flat]:
        optimizer.state[flat] |= {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
