"""The engine without DeepSpeed: one device, plain torch. For debugging, and for machines that have no DeepSpeed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import nn

from moe_dist.train.optim import MasterAdamW
from moe_dist.train.pieces import replicated_pieces


class PlainBackend:
    """What `Engine` asks of the machinery below it, for a single process, and for a rank whose pipeline stage holds
    nothing that trains: it has nothing to reduce. `DeepSpeedBackend` is the other one, whose gradients travel between
    stages with the factor W of its losses (see there); `scale` is that factor here."""

    def __init__(self, model: nn.Module, groups: list[dict], hyper: dict, *, scale: int = 1):
        self.module, self.scale = model, scale
        self.optimizer = MasterAdamW(
            groups or [{"params": [torch.zeros(0)]}], **hyper
        )  # AdamW refuses no tensor at all
        self.owned = self.held = list(replicated_pieces(self.optimizer.masters))

    def forward(self, **batch):
        return self.module(**batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if loss.requires_grad:
            (loss * self.scale).backward()

    def optimizer_step(self) -> None:
        self.optimizer.step()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def publish(self) -> None:
        self.optimizer.publish()

    def gathered(self, parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def close(self) -> None:
        self.optimizer.close()
