"""The search of a learning rate in the experiment on Nexus' quality."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def score(jobs: dict[str, dict], stage: str, rate: float, *, old: Sequence[str], new: Sequence[str]) -> float | None:
    """What a rate is judged by, from the finished trainings of a seed: lower is better. None where one is missing.

    stage `mix`: the mean loss over the old domains at the end. `extend`: the mean of that and of the loss on the new
    domain, at all budgets and for all new domains.
    """
    names = [f"search-mix-{rate}"] if stage == "mix" else [f"search-extend-{domain}-{rate}" for domain in new]
    if not all(name in jobs for name in names):
        return None
    if stage == "mix":
        trace = jobs[names[0]]["trace"]
        return _mean(trace[max(trace, key=int)], old)
    losses = []
    for name, domain in zip(names, new, strict=True):
        for point in jobs[name]["trace"].values():
            losses += [point["loss"][domain], _mean(point, old)]
    return statistics.fmean(losses)


def _mean(point: dict, names: Sequence[str]) -> float:
    return statistics.fmean(point["loss"][name] for name in names)
