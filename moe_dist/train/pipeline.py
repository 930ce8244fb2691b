"""The pipeline's schedule: in which order a stage runs the forwards and backwards of micro-batches, and what travels.

The order and the sends and receives are those of `torch.distributed.pipelining`: 1F1B, in which a stage keeps the
activations of at most as many micro-batches as there are stages from it to the last. Where a step has fewer
micro-batches than stages, which torch's 1F1B does not take, the first stage has all of them under way in any order, and
GPipe's, all forwards and then all backwards, serves.
DeepSpeed's `PipelineModule` wants a list of layers in the place of a model, and allows ZeRO 0 and 1 only.

torch's stage is a module whose outputs it differentiates. Here a stage is `Work`, whose forward and backward may be
anything: an engine's, say, that does not let anyone else call backward. torch deals the micro-batches' numbers out, in
the place of parts of a batch, and carries what `forward` and `backward` return.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from moe_dist.parallel import traffic
from moe_dist.parallel.grid import Grid


class Work(Protocol):
    """What a stage does with a micro-batch."""

    def forward(self, number: int, *received: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From what the stage before gave (nothing on the first stage) to what the next one gets: contiguous tensors
        without graph. What the last stage returns is not looked at."""
        ...

    def backward(self, number: int, *received: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From what the next stage's backward gave (nothing on the last stage) to what the stage before gets: a tensor
        for each that it gave. Backwards come in the order of the forwards."""
        ...


def run_schedule(
    work: Work, micro_batches: int, travels: Sequence[torch.Tensor], grid: Grid, *, backward: bool
) -> None:
    """Run `work` for every micro-batch of a step, in the order that keeps all stages busy. Collective.

    travels: shapes and dtypes, as tensors on the meta device, of what one stage gives the next for each micro-batch,
    and gets back for it in the backward; the same on both. backward: whether there is one. What travels is counted as
    "activations" and "activation gradients".
    """
    stage = _Stage(work, travels, grid, backward)
    schedule = Schedule1F1B if backward and micro_batches >= grid.pipeline else ScheduleGPipe
    numbers = torch.arange(micro_batches)
    loss = {"loss_fn": lambda output, number: output} if backward else {}
    try:
        schedule(stage, micro_batches, scale_grads=False, **loss).step(
            number=numbers, target=numbers if backward else None, return_outputs=False
        )
    except RuntimeError:
        if stage.failure is not None:  # torch makes a RuntimeError of whatever a forward raises
            raise stage.failure from None
        raise


class _Stage(PipelineStage):
    """torch's stage around `Work`. A buffer for what is received lives from the receive to the backward: torch has them
    for all micro-batches of a step at once, which is what 1F1B is there to avoid."""

    def __init__(self, work: Work, travels: Sequence[torch.Tensor], grid: Grid, backward: bool):
        metas = tuple(meta.detach().requires_grad_(backward) for meta in travels)
        super().__init__(
            nn.Identity(),  # not called
            grid.pipeline_rank,
            grid.pipeline,
            grid.device,
            input_args=() if grid.is_first_stage else metas,
            output_args=() if grid.is_last_stage else metas,
            group=grid.pipeline_group,
        )
        self.failure: Exception | None = None
        self._work, self._under_way = work, deque()

    def forward_maybe_with_nosync(self, *received: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._under_way.append(int(number))
        try:
            given = self._work.forward(int(number), *received)
        except Exception as error:
            self.failure = error
            raise
        if not self.has_backward:
            _drop(self.args_recv_info[int(number)])
        return given

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False):
        number = self._under_way.popleft()
        given = self._work.backward(number, *(bwd_kwargs["output_grads"] or ()))
        _drop(self.args_recv_info[number])
        _drop(self.grad_recv_info[number])
        return given, None

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._make(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward:
            self._make(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._noted("activations", super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._noted("activation gradients", super().get_bwd_send_ops(bwd_chunk_id))

    def _setup_forward_recv_info(self, *args) -> None:
        with self._without_memory():
            super()._setup_forward_recv_info(*args)

    def _setup_backward_recv_info(self, *args) -> None:
        with self._without_memory():
            super()._setup_backward_recv_info(*args)

    @contextlib.contextmanager
    def _without_memory(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        yield
        self.device = device

    def _make(self, infos: tuple) -> None:
        for info in infos:
            if not info.is_root_arg:
                info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=self.device)

    def _noted(self, what: str, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        for op in ops:
            rows = [0] * self.group_size
            rows[op.group_peer] = op.tensor.shape[:-1].numel()
            traffic.note(what, rows, self.group_rank, op.tensor.shape[-1] * op.tensor.element_size())
        return ops


def _drop(infos: tuple) -> None:
    for info in infos:
        info.buffer = None
