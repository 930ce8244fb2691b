"""All forwards and backwards of one optimizer step: what lies between its batches and `engine.step`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_dist.launch.guard import NO_GUARD, Guard
from moe_dist.parallel.collectives import waited
from moe_dist.parallel.grid import Grid
from moe_dist.train.engine import Engine
from moe_dist.train.losses import label_loss_sum
from moe_dist.train.routing import Routing
from moe_dist.train.rows import model_inputs, rank_rows


@dataclass(frozen=True)
class Passes:
    """What a step's passes leave behind on this rank.

    loss_sum: its share of the step's summed loss, a float64 scalar: over all ranks the shares make up the whole.
    finite: of each micro-batch, whether that share was finite, bool scalars. work: seconds of forward without waiting
    for others' tokens.
    """

    loss_sum: torch.Tensor
    finite: list[torch.Tensor]
    work: float


def run_passes(
    engine: Engine, routing: Routing, batches: Sequence[dict], *, labels: int, grid: Grid, guard: Guard = NO_GUARD
) -> Passes:
    """Accumulate the gradients of a step, between `routing.start_step` and `engine.step`. Collective.

    batches: the micro-batches of this data rank, `engine.accumulation_steps` of them, on the grid's device. labels: the
    label tokens of the step over all ranks and micro-batches, by which the loss is divided.
    """
    model = engine.module
    loss_sum = torch.zeros((), dtype=torch.float64, device=grid.device)
    finite, work = [], 0.0
    for batch in batches:
        guard.beat("forward")
        started, waited_before = time.perf_counter(), waited()
        rows = rank_rows(batch, grid)
        routing.see(rows.real_BS)
        with routing.listening():
            logits = engine.forward(**model_inputs(rows, model.config, dtype=model.dtype)).logits
            loss = label_loss_sum(logits, batch["labels"])
        loss_sum += loss.detach()
        work += time.perf_counter() - started - (waited() - waited_before)
        guard.beat("backward")
        finite.append(loss.detach().isfinite())
        # The mean of the routing losses over micro-batches; see `moe.balance`.
        engine.backward(loss / max(labels, 1) + routing.loss_share(rows) / len(batches))
    return Passes(loss_sum, finite, work)
