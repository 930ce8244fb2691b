"""Results of the experiment on Nexus' quality: the figures of each arm, from the finished trainings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks._nexus_runs import Settings


@dataclass(frozen=True)
class Results:
    """jobs: {seed: {name of a training: what came out}}, of what is finished."""

    settings: Settings
    old: list[str]
    new: list[str]
    jobs: dict[int, dict[str, dict]]

    def mixed(self, arm: str) -> dict[int, dict]:
        """{seed: mean loss before and after training, and the share of tokens that go to their own domain's expert}."""
        found = {}
        for seed, jobs in self.jobs.items():
            if f"mix-{arm}" in jobs:
                first, end = jobs[f"mix-{arm}"]["trace"]["0"], last(jobs[f"mix-{arm}"])
                own = {domain: share[domain] for domain, share in end["share"].items()}
                found[seed] = {
                    "before": mean(first["loss"], self.old),
                    "loss": mean(end["loss"], self.old),
                    "own": mean(own, self.old) if own else None,
                }
        return found

    def extended(self, arm: str, budget: int) -> dict[int, dict]:
        """{seed: means over the new domains of `each_extended`} for the seeds that have all of them."""
        found = {}
        for (seed, _), point in self.each_extended(arm, budget).items():
            found.setdefault(seed, []).append(point)
        whole = {seed: points for seed, points in found.items() if len(points) == len(self.new)}
        return {s: {key: statistics.fmean(p[key] for p in points) for key in points[0]} for s, points in whole.items()}

    def each_extended(self, arm: str, budget: int) -> dict[tuple[int, str], dict]:
        """{(seed, new domain): loss on it, mean loss on the old ones, the new expert's share of its own domain's tokens
        and of the old domains'}."""
        names = {(seed, domain): f"extend-{domain}-{arm}" for seed in self.jobs for domain in self.new}
        return {
            (seed, domain): self._point(self.jobs[seed][name]["trace"][str(budget)], domain)
            for (seed, domain), name in names.items()
            if name in self.jobs[seed]
        }

    def minutes(self) -> float:
        """What all finished trainings took."""
        return sum(job["wall_seconds"] for jobs in self.jobs.values() for job in jobs.values()) / 60

    def _point(self, point: dict, domain: str) -> dict:
        return {
            "new": point["loss"][domain],
            "old": mean(point["loss"], self.old),
            "own": point["share"][domain][domain],
            "taken": statistics.fmean(point["share"][name][domain] for name in self.old),
        }


def last(job: dict) -> dict:
    """What was measured at the end of a training."""
    return job["trace"][max(job["trace"], key=int)]


def mean(values: dict[str, float], names: Sequence[str]) -> float:
    return statistics.fmean(values[name] for name in names)
