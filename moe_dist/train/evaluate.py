"""Held-out loss and perplexity, domain by domain."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

from moe_dist.models.mixse.recorder import RoutingRecorder
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.parallel.sequence import own_slice
from moe_dist.train.losses import count_labels
from moe_dist.train.routing import of_all_stages
from moe_dist.train.trainable import layer_index


@torch.no_grad()
def held_out(
    losses: Callable[[Iterable[dict]], Iterator[torch.Tensor]],
    model: torch.nn.Module,
    batches: Iterable[dict],
    grid: Grid,
) -> dict:
    """Mean loss per label token and perplexity over the batches of all ranks, and who got their tokens. Collective.

    Returns loss, perplexity, tokens, and under `experts` {layer index: [slots of each expert]}: with one call a domain,
    the routing share of each domain and expert. A mixture with one α for all layers has one entry, layer 0.

    losses: batches -> this rank's share of the summed loss of each, as `passes.run_forwards` yields them. batches:
    whole rows; every rank must bring the same number of them: the experts are everywhere. Load statistics of training
    are not touched.
    """
    was_training = model.training
    model.eval()
    layers = moe_layers(model)
    kept = [(layer.statistics.counts_E, layer.statistics.dropped) for _, layer in layers]
    for _, layer in layers:
        layer.statistics.reset()
    total = torch.zeros(2, dtype=torch.float64, device=grid.device)
    recorder = RoutingRecorder(model) if hasattr(model, "mixse") else None

    def watched() -> Iterator[dict]:
        for batch in batches:
            if recorder is not None:
                recorder.mask_BL = own_slice(batch["attention_mask"], grid)
            if grid.is_first_stage and grid.slice_rank == 0:  # all stages and slices have the same rows
                total[1] += count_labels(batch["labels"])
            yield batch

    with recorder or contextlib.nullcontext():
        for loss in losses(watched()):
            total[0] += loss
    experts = {} if recorder is None else _slots_of_mixture(recorder, grid)
    for (name, layer), (counts_E, dropped) in zip(layers, kept, strict=True):
        slots = layer.statistics.total(grid.stage_group, grid.device).tolist()
        experts[str(layer_index(name))] = slots[:-1]
        layer.statistics.counts_E, layer.statistics.dropped = counts_E, dropped
    model.train(was_training)
    if grid.world > 1:
        dist.all_reduce(total)
    loss = (total[0] / total[1].clamp(min=1)).item()
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": int(total[1]),
        "experts": of_all_stages(experts, grid),
    }


def _slots_of_mixture(recorder: RoutingRecorder, grid: Grid) -> dict[str, list[int]]:
    """The same of a mixture of LoRA experts: {block: tokens that each expert had a part in}, over all ranks."""
    found = {}
    for block, counts_3N in recorder.counts().items():
        slots_N = counts_3N[1].to(grid.device)
        if grid.world > 1:
            dist.all_reduce(slots_N)
        found[str(block)] = [int(slots) for slots in slots_N]
    return found
