"""What a training step costs besides time: floating-point operations and bytes, counted, not estimated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.ops import memory, native


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in `step`, as torch's counter sees them; our native products
    by the formula of each product that they are asked for."""
    ours = {}
    if native.has_cpu():
        ours = {torch.ops.moe_dist.experts_forward: _forward, torch.ops.moe_dist.experts_backward: _backward}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        step()
    return counter.get_total_flops()


def _forward(x, w_in, w_out, counts, factor, y, z=None, *, out_shape=None) -> int:
    """Shapes of the operator's tensors -> 2 · rows · (F·H + H·I)."""
    return _product(x, w_in) + _product(x, w_out)


def _backward(
    dy, x, z, w_in, w_out, counts, factor, dx=None, dw_in=None, dw_out=None, dfactor=None, *, out_shape=None
) -> int:
    """The gradient of a (always), of the rows and of each weight where wanted, and z where it was not kept."""
    wide, narrow = _product(dy, w_in), _product(dy, w_out)
    return narrow + wide * ((z is None) + (dx is not None) + (dw_in is not None)) + narrow * (dw_out is not None)


def _product(rows, weight) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


def allocated(step: Callable[[], object]) -> tuple[int, int]:
    """(peak bytes of what `step` allocates and gives back: activations and all that is temporary; bytes that it leaves
    behind: gradients), from the events of torch's CPU allocator."""
    # Our large tensors come from memory of our own, which torch's allocator does not see: not so in this step.
    with (
        mock.patch.object(memory, "_LARGE", sys.maxsize),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        step()
    events = sorted(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    live: dict[int, tuple[int, int]] = {}  # address -> (index, bytes)
    last = {}  # index of an allocation -> when it was given back
    for index, (_, address, size) in enumerate(events):
        if size > 0:
            live[address] = (index, size)
        elif address in live:
            last[live.pop(address)[0]] = index
    left = sum(size for _, size in live.values())
    now = peak = 0
    ends = {end: events[start][2] for start, end in last.items()}
    for index, (_, _, size) in enumerate(events):
        if index in last:
            now += size
        now -= ends.get(index, 0)
        peak = max(peak, now)
    return peak, left


def _allocations(tree) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of every allocation, and of every release with negative bytes."""
    for event in tree:
        if event.name == "[memory]":
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        yield from _allocations(event.children)
