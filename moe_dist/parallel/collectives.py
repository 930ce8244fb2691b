"""Exchanges between ranks. None of them is seen by autograd: who uses one in a forward writes its backward, too.

Model code uses these and never `torch.distributed` directly, so that everything that travels is counted (`traffic`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_dist.parallel import traffic

_waited = 0.0
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


@dataclass(frozen=True)
class Flight:
    """Rows under way. `sent_NH` stays alive until they have landed: the exchange reads it."""

    received_RH: torch.Tensor
    sent_NH: torch.Tensor
    work: dist.Work

    def land(self) -> torch.Tensor:
        """The received rows `[R, ...]`; on a GPU the current stream waits for them, the host does not."""
        global _waited
        start = time.perf_counter()
        self.work.wait()
        _waited += time.perf_counter() - start
        return self.received_RH


def start_exchange(
    rows_NH: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, *, what: str
) -> Flight:
    """Send `send[r]` consecutive rows to each rank r of `group` and receive `receive[r]` from it, in rank order.

    rows_NH: `[sum(send), ...]`. What lands is `[sum(receive), ...]`, same dtype. Counts may be zero and uneven.
    Every rank of the group calls this, in the same order of calls. `what` names the exchange where it is counted.
    """
    rows_NH = rows_NH.contiguous()
    received_RH = rows_NH.new_empty((sum(receive), *rows_NH.shape[1:]))
    traffic.note(what, send, dist.get_rank(group), rows_NH[:1].numel() * rows_NH.element_size())
    work = dist.all_to_all_single(received_RH, rows_NH, receive, send, group=group, async_op=True)
    return Flight(received_RH, rows_NH, work)


def exchange(
    rows_NH: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, *, what: str
) -> torch.Tensor:
    """`start_exchange`, and wait."""
    return start_exchange(rows_NH, send, receive, group, what=what).land()


def gather(x: torch.Tensor, group: dist.ProcessGroup, *, what: str) -> torch.Tensor:
    """The `x` of every rank of `group`, of one shape and dtype on all of them, stacked in rank order: `[P, ...]`."""
    x, size = x.contiguous(), dist.get_world_size(group)
    gathered = x.new_empty((size, *x.shape))
    traffic.note(what, [1] * size, dist.get_rank(group), x.nbytes)
    work = _all_gather(gathered.view(-1), x.view(-1), group=group, async_op=True)
    return Flight(gathered, x, work).land()


def waited() -> float:
    """Seconds that this process has waited for rows so far: what a rank works is its time without them."""
    return _waited


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum of `tensor` over `group` (None: this rank alone), as a new tensor without gradient."""
    total = tensor.detach().clone()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total
