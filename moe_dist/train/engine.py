"""The engine: a model with an optimizer, behind the same few calls on one device or many, at every ZeRO stage.

    engine = build_engine(model, grid, zero_stage=1, precision="bf16", clip_norm=1.0, accumulation_steps=2, ...)
    for batch in micro_batches:
        loss_sum = loss_of(engine.forward(**batch))
        engine.backward(loss_sum / label_tokens_of_the_step)     # all micro-batches, all ranks
    result = engine.step(lr)

**Scale.** The loss of an optimizer step is L = Σ_r Σ_m l_rm / N: l_rm sums the loss over the label tokens of
micro-batch m on rank r, N counts the label tokens of all of them. Each `backward` gets its l_rm / N, so the gradient
of the step is the plain sum over micro-batches and ranks, with no averaging and no further factor. An expert's rows
come from every rank of its expert group through the all-to-all, whose backward brings ∂l_rm/∂row of each back to it:
summing over its replicas (the expert-data-parallel group) then completes the sum over all r, whatever the size of
the expert group is. So it is with what is cut over the tensor axis, and the exchanges around its blocks. The ranks r
are those of a pipeline stage; a stage before the last gets as its l_rm what has ∂L/∂(its output) as its gradient.

**Norm, clipping, skipping** are decided here for all engines alike: the norm is the root of the sum of squares over
pieces (see `pieces`), in which each element of each parameter occurs once over all ranks; and one all-reduce carries it
together with the flag "some loss was not finite", so that all ranks reach the same verdict.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.checkpoint.fragments import Fragment, Place
from moe_dist.errors import UserError
from moe_dist.parallel.grid import Grid
from moe_dist.train.optim import create_state, parameter_groups
from moe_dist.train.pieces import KINDS, Piece, global_names
from moe_dist.train.plain import PlainBackend
from moe_dist.train.tied import TiedCopies, tied_copies

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Backend(Protocol):
    """The machinery below an engine.

    `optimizer` carries the learning rate, and the state that pieces point into. `held`: the pieces that this rank's
    optimizer steps. `owned`: those that it answers for, so that over all ranks each element is owned once; fewer where
    the optimizer is replicated.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    held: list[Piece]
    owned: list[Piece]

    def forward(self, **batch): ...
    def backward(self, loss: torch.Tensor, *, last: bool) -> None: ...
    def optimizer_step(self) -> None: ...
    def drop_gradients(self) -> None: ...
    def publish(self) -> None: ...
    def gathered(self, parameters): ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """grad_norm: global norm before clipping (not finite where the step was skipped for its gradients)."""

    grad_norm: float
    skipped: bool


class Engine:
    """See the module's text. `module` is the model; `steps` and `skipped_steps` count calls of `step`."""

    def __init__(
        self,
        backend: Backend,
        grid: Grid,
        names: dict,
        *,
        tied: TiedCopies | None,
        clip_norm: float | None,
        accumulation_steps: int,
    ):
        self.grid, self.clip_norm, self.accumulation_steps = grid, clip_norm, accumulation_steps
        self.steps = self.skipped_steps = 0
        #: Optimizer steps in AdamW's bias correction (skipped ones do not count); 0 before the first.
        self.adam_step = 0
        self._backend, self._names, self._tied = backend, names, tied
        self._owned = [piece for piece in backend.owned if tied is None or not tied.is_copy(piece.parameter)]
        self._micro_batches = 0
        self._tied_summed = False
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=grid.device)

    @property
    def module(self) -> nn.Module:
        return self._backend.module

    def forward(self, **batch):
        """The model's output for one micro-batch."""
        return self._backend.forward(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, a scalar: this micro-batch's summed loss over the step's *global* label count.

        Collective. Called `accumulation_steps` times before each `step`, on every rank, also where a rank's
        micro-batch has no label at all (its loss is then a zero that hangs on the model's output).
        """
        assert self._micro_batches < self.accumulation_steps, "more micro-batches than accumulation_steps"
        self._micro_batches += 1
        self._bad_loss |= ~loss.detach().isfinite()
        self._backend.backward(loss, last=self._micro_batches == self.accumulation_steps)

    def step(self, lr: float) -> StepResult:
        """Clip by the global norm and step the optimizer; or skip, on all ranks, if any loss or gradient anywhere is
        not finite: weights and optimizer state then keep their bits. Collective."""
        assert self._micro_batches == self.accumulation_steps, "fewer micro-batches than accumulation_steps"
        self._sum_tied()
        norm, bad_loss = self._norm_and_flag()
        skipped = bad_loss or not math.isfinite(norm)
        if skipped:
            self._backend.drop_gradients()
        else:
            self._clip(norm)
            for group in self._backend.optimizer.param_groups:
                group["lr"] = lr
            self._backend.optimizer_step()
            self.adam_step += 1
        self._micro_batches = 0
        self._tied_summed = False
        self._bad_loss.zero_()
        self.steps += 1
        self.skipped_steps += skipped
        return StepResult(grad_norm=norm, skipped=skipped)

    def _sum_tied(self) -> None:
        """Not in the last `backward`: the last stage comes to it long before the first one, which waits for it."""
        if self._tied and not self._tied_summed:
            self._tied.sum_gradients()
        self._tied_summed = True

    def _norm_and_flag(self) -> tuple[float, bool]:
        # Squares are summed in float64: float32 loses digits over long tensors and overflows from gradients of 1e19.
        total = torch.zeros(2, dtype=torch.float64, device=self.grid.device)
        for piece in self._owned:
            gradient = piece.gradient()
            if gradient is not None:
                total[0] += torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
        total[1] = self._bad_loss
        if self.grid.world > 1:
            dist.all_reduce(total)
        square, bad = total.tolist()
        return math.sqrt(square) if square >= 0 else math.nan, bool(bad)

    def _clip(self, norm: float) -> None:
        if self.clip_norm is None or norm + 1e-6 <= self.clip_norm:
            return
        factor = self.clip_norm / (norm + 1e-6)
        for piece in self._backend.held:
            gradient = piece.gradient()
            if gradient is not None:
                gradient.mul_(factor)

    def gradients(self) -> Iterator[Fragment]:
        """The reduced gradients that this rank owns, between the last `backward` and `step`, before clipping.
        Collective."""
        self._sum_tied()
        for piece in self._owned:
            gradient = piece.gradient()
            if gradient is not None:
                yield from self._names[piece.parameter].fragments(piece.offset, gradient)

    def fragments(self, kind: str) -> Iterator[Fragment]:
        """The part of one kind (weights: the fp32 masters; exp_avg; exp_avg_sq) that this rank owns, as views.

        Over all ranks the fragments make up every trainable tensor exactly once. Before the first optimizer step the
        moments are zeros.
        """
        assert kind in KINDS, kind
        self._create_state()
        for piece in self._owned:
            tensor = piece.view(kind, self._backend.optimizer)
            yield from self._names[piece.parameter].fragments(piece.offset, tensor)

    def load_fragments(self, read: Callable[[str, list[Place]], Iterator[torch.Tensor]], *, adam_step: int) -> None:
        """Set masters and moments from outside, and the parameters from the masters, bit for bit. Collective.

        `read(kind, places)` returns a 1-D tensor for each place, in order; the place's `start` is the position within
        the buffer of one piece and of no interest to it. What was saved at another size of any kind, or ZeRO stage,
        fits: places are global.
        """
        self._create_state()
        for kind in KINDS:
            views, places = [], []
            for piece in self._backend.held:
                view = piece.view(kind, self._backend.optimizer)
                for place in self._names[piece.parameter].places(piece.offset, piece.length):
                    places.append(place)
                    views.append(view[place.start : place.start + place.range.numel])
            for view, tensor in zip(views, read(kind, places), strict=True):
                view.copy_(tensor)
        for state in self._backend.optimizer.state.values():
            state["step"].fill_(adam_step)
        self.adam_step = adam_step
        self._backend.publish()

    def _create_state(self) -> None:
        for piece in self._backend.held:
            create_state(self._backend.optimizer, piece.flat)

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every parameter as this rank's experts have it, gathered over ZeRO 3's partitions one at a
        time: the tensor is valid until the next one is asked for. Collective."""
        for name, parameter in self.module.named_parameters():
            with self._backend.gathered([parameter]):
                yield name, parameter.detach()

    def gathered(self, parameters):
        """Context in which these parameters are whole on every rank (ZeRO 3 partitions them). Collective."""
        return self._backend.gathered(parameters)

    def close(self) -> None:
        """Take the engine's hooks off the model."""
        self._backend.close()


def build_engine(
    model: nn.Module,
    grid: Grid,
    *,
    zero_stage: int = 1,
    precision: str = "fp32",
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    accumulation_steps: int = 1,
    reduce_bucket_size: int = 50_000_000,
    backend: str = "auto",
) -> Engine:
    """An engine around `model`, whose parameters that require grad are trained. Collective.

    Args:
        precision: "fp32" or "bf16": what the parameters are cast to. Masters, accumulated gradients, their reduction
            and the optimizer state are fp32 in both.
        reduce_bucket_size: elements of ZeRO's reduction bucket; also bounds what stage 3 prefetches and keeps whole.
        backend: "deepspeed", "plain" (one device, no ZeRO), or "auto": the first where it is installed.

    Raises:
        UserError: nothing trains; plain torch was asked for more than one rank, or is all there is for them.
    """
    trains = any(parameter.requires_grad for parameter in model.parameters())
    if not trains and grid.pipeline == 1:
        raise UserError("no parameter of the model trains: there is nothing for an engine to do")
    if backend == "auto":
        backend = "deepspeed" if importlib.util.find_spec("deepspeed") else "plain"
    if backend == "plain" and grid.world > 1:
        raise UserError(f"{grid.world} ranks need DeepSpeed, which is not installed: pip install deepspeed")
    cast_parameters(model, DTYPES[precision])
    model.to(grid.device)
    copies = tied_copies(model, grid)
    tied = TiedCopies(model, grid, copies) if copies else None
    names = global_names(model, copies if grid.is_last_stage else {})
    groups = parameter_groups(model, weight_decay=weight_decay)
    hyper = {"lr": 0.0, "betas": tuple(betas), "eps": eps}
    if grid.device.type == "cpu" and not tied:
        # One pass over masters and moments instead of ten; on CUDA torch chooses well itself. But there the last bit of
        # a result may depend on where in the buffer an element lies, which differs between two copies of a tensor.
        hyper["fused"] = True
    if backend == "plain" or not trains:
        machinery: Backend = PlainBackend(model, groups, hyper, scale=grid.stage_size)
    else:
        from moe_dist.train.deepspeed_seam import DeepSpeedBackend

        machinery = DeepSpeedBackend(
            model,
            grid,
            groups,
            hyper,
            zero_stage=zero_stage,
            precision=precision,
            reduce_bucket_size=reduce_bucket_size,
        )
    if tied:
        tied.connect(machinery.held)
    return Engine(machinery, grid, names, tied=tied, clip_norm=clip_norm, accumulation_steps=accumulation_steps)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters, not buffers: rotary frequencies and expert biases stay as they were."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
