"""Held-out loss and perplexity, domain by domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.train.losses import count_labels, label_loss_sum


@torch.no_grad()
def held_out(
    forward: Callable[[dict], torch.Tensor], model: torch.nn.Module, batches: Iterable[dict], grid: Grid
) -> dict[str, float]:
    """Mean loss per label token and perplexity over the batches of all ranks. Collective.

    forward: batch -> logits `[B,L,V]`. Every rank must bring the same number of batches: the experts are everywhere.
    Load statistics of training are not touched.
    """
    was_training = model.training
    model.eval()
    kept = [(layer, layer.statistics.counts_E, layer.statistics.dropped) for _, layer in moe_layers(model)]
    total = torch.zeros(2, dtype=torch.float64, device=grid.device)
    for batch in batches:
        total[0] += label_loss_sum(forward(batch), batch["labels"])
        total[1] += count_labels(batch["labels"])
    for layer, counts_E, dropped in kept:
        layer.statistics.counts_E, layer.statistics.dropped = counts_E, dropped
    model.train(was_training)
    if grid.world > 1:
        dist.all_reduce(total)
    loss = (total[0] / total[1].clamp(min=1)).item()
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(total[1])}
