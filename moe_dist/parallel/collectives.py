"""Collectives that autograd sees. Model code uses these and never `torch.distributed` directly: a plain collective
cuts the graph, and the gradient of whatever went through it is lost without a word."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

_waited = 0.0


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_NH, send, receive, group):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return exchange_rows(rows_NH, send, receive, group)

    @staticmethod
    def backward(ctx, grad_RH):
        # The rows came from the ranks that `send` counts: their gradients go back the same way.
        return exchange_rows(grad_RH.contiguous(), ctx.receive, ctx.send, ctx.group), None, None, None


def all_to_all(rows_NH: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Send `send[r]` consecutive rows to each rank r of `group` and receive `receive[r]` from it, in rank order.

    rows_NH: `[sum(send), ...]`. Returns `[sum(receive), ...]`, same dtype. Counts may be zero and uneven.
    Differentiable; the backward is the same exchange reversed, and runs on every rank of the group alike.
    """
    return _AllToAll.apply(rows_NH, send, receive, group)


def exchange_rows(rows_NH: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """The exchange of `all_to_all` without autograd (for integers and inside backward functions)."""
    global _waited
    received_RH = rows_NH.new_empty((sum(receive), *rows_NH.shape[1:]))
    start = time.perf_counter()
    dist.all_to_all_single(
        received_RH, rows_NH.contiguous(), output_split_sizes=receive, input_split_sizes=send, group=group
    )
    _waited += time.perf_counter() - start
    return received_RH


def waited() -> float:
    """Seconds that this process has spent in exchanges so far: what a rank works is its time without them."""
    return _waited


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum of `tensor` over `group` (None: this rank alone), as a new tensor without gradient."""
    total = tensor.detach().clone()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total
