"""Learning-rate schedules: pure functions of the step, so that a resumed run needs nothing but its step number.

Steps count from 0. All schedules warm up linearly, reaching the peak at step `warmup`.
"""

from __future__ import annotations

import math

from moe_dist.errors import UserError


def cosine(step: int, *, total: int, warmup: int = 0, min_ratio: float = 0.0) -> float:
    """Half a cosine from 1 at step `warmup` down to `min_ratio` at `total`, so that the last step still learns."""
    if step < warmup:
        return _warm(step, warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(step: int, *, warmup: int = 0) -> float:
    """1 from step `warmup` on."""
    return _warm(step, warmup) if step < warmup else 1.0


def wsd(step: int, *, total: int, warmup: int = 0, decay: int | None = None, min_ratio: float = 0.0) -> float:
    """Warm-up, stable at 1, then a straight line down to `min_ratio` at `total`.

    decay: steps of that line; a tenth of `total` (at least one) when None.
    """
    decay = max(1, total // 10) if decay is None else decay
    start = total - decay
    if step < min(warmup, start):
        return _warm(step, warmup)
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / decay)
    return 1.0 + (min_ratio - 1.0) * progress


def learning_rate(
    name: str,
    step: int,
    *,
    peak: float,
    total: int,
    warmup: int = 0,
    decay: int | None = None,
    min_ratio: float = 0.0,
) -> float:
    """The learning rate of `step` (from 0) under the schedule `name`: cosine, constant or wsd."""
    if name == "cosine":
        return peak * cosine(step, total=total, warmup=warmup, min_ratio=min_ratio)
    if name == "constant":
        return peak * constant(step, warmup=warmup)
    if name == "wsd":
        return peak * wsd(step, total=total, warmup=warmup, decay=decay, min_ratio=min_ratio)
    raise UserError(f"unknown schedule {name!r}; known: cosine, constant, wsd")


def _warm(step: int, warmup: int) -> float:
    return (step + 1) / (warmup + 1)
