"""Time on a device: what a function takes on the GPU with cold caches, and how much time the whole suite has left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from benchmarks._harness import Median, interleaved

_FLUSH = 512 << 20  # bytes, at least: reading them also keeps the GPU busy while the host issues what is measured


class Deadline:
    """Seconds that are left; `fits` decides by what an earlier piece of work took."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    def left(self) -> float:
        return max(0.0, self.end - time.perf_counter())

    def fits(self, seconds: float) -> bool:
        return seconds <= self.left()


class Clock:
    """Median milliseconds of functions that take turns. On a GPU by CUDA events, each time with an L2 cache full of
    something else (read, not written: what is measured need not write it back first); on a CPU by the wall clock."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.other = torch.zeros(max(_FLUSH, 4 * cache) // 4, device=device)
            self.sum = torch.empty((), device=device)

    def medians(
        self, functions: Sequence[Callable[[], object]], *, rounds: int = 40, seconds: float = 1.0
    ) -> list[Median]:
        """Stops after `rounds` turns, or after `seconds` once there were three."""
        if self.device.type != "cuda":
            return interleaved(functions, rounds=min(rounds, 5), seconds=min(seconds, 0.2))
        for function in functions:
            function()
        torch.cuda.synchronize()
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in functions]
        begin = time.perf_counter()
        for turn in range(rounds):
            for function, pairs in zip(functions, events, strict=True):
                pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.sum(self.other, dim=0, out=self.sum)
                pair[0].record()
                function()
                pair[1].record()
                pairs.append(pair)
            torch.cuda.synchronize()
            if turn >= 2 and time.perf_counter() - begin > seconds:
                break
        return [Median([start.elapsed_time(end) for start, end in pairs]) for pairs in events]


def copy_time(clock: Clock, bytes_moved: int) -> Median:
    """Milliseconds in which the device copies, so that it reads and writes `bytes_moved` in all."""
    source = torch.zeros(max(bytes_moved // 2, 16), dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    return clock.medians([lambda: target.copy_(source)], seconds=0.2)[0]
