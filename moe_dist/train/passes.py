"""All forwards and backwards of one optimizer step: what lies between its batches and `engine.step`.

With one pipeline stage it is a loop. With several, each rank runs its stage for every micro-batch, in the order of
`train.pipeline`: forward takes hidden states from the stage before and gives its own to the next one, backward takes
their gradients the other way. The gradient of a stage's parameters is that of the scalar

    Σ_i h_i g_i + r,    h the hidden states it gave, g the gradient ∂loss/∂h that came back, r its routers' losses;

on the last stage the language-model loss is in the place of the sum. So an engine sees ordinary scalars. Its factor, by
which it multiplies them (see `train.deepspeed_seam`), is in every gradient that travels, and not applied to it again.

The balance loss `hf` is a product of sums over the layers of all stages, Σ_i c_i · m_i. The loads c travel on with the
hidden states, each stage adding its own; the last one knows them all and sends them back with the gradients, and each
stage's share is its own Σ_i c_i m_i.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from moe_dist.launch.guard import NO_GUARD, Guard
from moe_dist.moe.balance import HfParts
from moe_dist.parallel.collectives import waited
from moe_dist.parallel.grid import Grid
from moe_dist.train.engine import Engine
from moe_dist.train.losses import target_loss_sum
from moe_dist.train.pipeline import run_schedule
from moe_dist.train.routing import Routing
from moe_dist.train.rows import Rows, model_inputs, rank_rows

UNDER_WAY = 4  # batches a stage that are evaluated in one go: so seldom do all stages wait for each other


@dataclass(frozen=True)
class Passes:
    """What a step's passes leave behind on this rank.

    loss_sum: its share of the step's summed loss, a float64 scalar: over all ranks the shares make up the whole.
    finite: of each micro-batch, whether that share was finite, bool scalars; none but on the last stage. work: seconds
    of forward without waiting for others' tokens.
    """

    loss_sum: torch.Tensor
    finite: list[torch.Tensor]
    work: float


def run_passes(
    engine: Engine, routing: Routing, batches: Sequence[dict], *, labels: int, grid: Grid, guard: Guard = NO_GUARD
) -> Passes:
    """Accumulate the gradients of a step, between `routing.start_step` and `engine.step`. Collective.

    batches: the micro-batches of this data rank, `engine.accumulation_steps` of them, whole rows on the grid's device.
    labels: the label tokens of the step over all ranks and micro-batches, by which the loss is divided.
    """
    step = _Step(engine, routing, batches, labels, grid, guard)
    if grid.pipeline > 1:
        run_schedule(step, len(batches), step.travels(), grid, backward=True)
    else:
        for number in range(len(batches)):
            step.forward(number)
            step.backward(number)
    return Passes(step.loss_sum, step.finite, step.work)


@torch.no_grad()
def run_forwards(
    call: Callable, model: nn.Module, routing: Routing, batches: Iterable[dict], grid: Grid, *, guard: Guard = NO_GUARD
) -> Iterator[torch.Tensor]:
    """Yield this rank's share of the summed loss of each batch, a float32 scalar. Collective.

    call: the model, or its engine's forward. batches: as in `run_passes`, the same number on every rank.
    """
    batches = iter(batches)
    while some := list(islice(batches, UNDER_WAY * grid.pipeline if grid.pipeline > 1 else 1)):
        forwards = _Forwards(call, model, routing, some, grid, guard)
        if grid.pipeline > 1:
            run_schedule(forwards, len(some), [forwards.hidden_meta()], grid, backward=False)
        else:
            forwards.forward(0)
        yield from forwards.losses


class _Forwards:
    """`Work` of one rank that ends with the forwards. losses: of each micro-batch, zeros before the last stage."""

    def __init__(
        self, call: Callable, model: nn.Module, routing: Routing, batches: Sequence[dict], grid: Grid, guard: Guard
    ):
        self.call, self.model, self.routing, self.batches = call, model, routing, batches
        self.grid, self.guard = grid, guard
        self.losses: list[torch.Tensor] = []

    def hidden_meta(self) -> torch.Tensor:
        """Shape and dtype of the hidden states that travel for one micro-batch, on the meta device."""
        shape_BS = rank_rows(self.batches[0], self.grid).real_BS.shape
        hidden = self.model.config.get_text_config().hidden_size
        return torch.empty(*shape_BS, hidden, dtype=self.model.dtype, device="meta")

    def forward(self, number: int, *received: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.guard.beat("evaluation")
        output = self._output(rank_rows(self.batches[number], self.grid), *received)
        if self.grid.is_last_stage:
            self.losses.append(output)
            return ()
        self.losses.append(torch.zeros((), device=self.grid.device))
        return (output.contiguous(),)

    def _output(self, rows: Rows, *received: torch.Tensor) -> torch.Tensor:
        """The summed loss of this rank's tokens on the last stage, hidden states `[B,S,H]` on others."""
        inputs = model_inputs(rows, self.model.config, dtype=self.model.dtype)
        if received:
            del inputs["input_ids"]
            inputs["inputs_embeds"] = received[0]
        self.routing.see(rows.real_BS)
        output = self.call(**inputs).logits
        if not self.grid.is_last_stage:
            return output
        return target_loss_sum(output, rows.targets_BM, group=self.grid.tensor_group)


@dataclass(frozen=True)
class _Flight:
    """A micro-batch between its forward and its backward. hidden: what was received, a leaf. output: hidden states or
    loss, with graph. share: the routers' losses of this stage, but for `hf`. load_E: for it, of the stages so far."""

    hidden: torch.Tensor | None
    output: torch.Tensor
    share: torch.Tensor | float
    hf: HfParts | None
    load_E: torch.Tensor | None


class _Step(_Forwards):
    """`Work` of one rank in a step of training; see the module's text."""

    def __init__(
        self, engine: Engine, routing: Routing, batches: Sequence[dict], labels: int, grid: Grid, guard: Guard
    ):
        super().__init__(engine.forward, engine.module, routing, batches, grid, guard)
        self.engine, self.labels = engine, max(labels, 1)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=grid.device)
        self.finite: list[torch.Tensor] = []
        self.work = 0.0
        self._flights: dict[int, _Flight] = {}

    def travels(self) -> list[torch.Tensor]:
        """Shapes and dtypes of what goes from stage to stage for one micro-batch, on the meta device."""
        metas = [self.hidden_meta()]
        if self.routing.hf_on:
            metas.append(torch.empty(self.routing.num_experts, dtype=torch.float64, device="meta"))
        return metas

    def forward(self, number: int, *received: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.guard.beat("forward")
        started, waited_before = time.perf_counter(), waited()
        rows = rank_rows(self.batches[number], self.grid)
        with self.routing.listening():
            output = self._output(rows, *received[:1])
        self.work += time.perf_counter() - started - (waited() - waited_before)
        if self.grid.is_last_stage:
            self.loss_sum += output.detach()
            self.finite.append(output.detach().isfinite())
        if self.grid.pipeline == 1:
            self._flights[number] = _Flight(None, output, self.routing.loss_share(rows), None, None)
            return ()
        losses = self.routing.losses(rows)
        load_E = sum(received[1:], losses.hf.load_E.double()) if losses.hf else None
        hidden = received[0] if received else None
        self._flights[number] = _Flight(hidden, output, losses.share, losses.hf, load_E)
        if self.grid.is_last_stage:
            return ()
        return output.detach().contiguous(), *([load_E] if losses.hf else [])

    def backward(self, number: int, *received: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.guard.beat("backward")
        flight = self._flights.pop(number)
        loads = received[1:]
        if self.grid.is_last_stage:
            scalar = flight.output / self.labels
            loads = (flight.load_E,) if flight.hf else ()
        else:
            scalar = _Continued.apply(flight.output, received[0])
        share = flight.share
        if flight.hf:
            share = share + self.routing.settings.balance_coef * flight.hf.share(*loads)
        # The mean of the routing losses over micro-batches; see `moe.balance`.
        self.engine.backward(scalar + share / len(self.batches))
        return () if flight.hidden is None else (flight.hidden.grad.contiguous(), *loads)


class _Continued(torch.autograd.Function):
    """A scalar, zero, whose gradient at `output` is `gradient`, whatever the engine multiplies the scalar by: the stage
    that `gradient` comes from has multiplied by the same."""

    @staticmethod
    def forward(ctx, output, gradient):
        ctx.save_for_backward(gradient)
        return torch.zeros((), device=output.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *ctx.saved_tensors, None
