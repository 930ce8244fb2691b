"""Results of the experiment on ESFT's quality: read, compared seed by seed, and as rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _harness
from benchmarks._quality_runs import ARMS, COVERED, Settings
from benchmarks._quality_training import spread
from moe_dist.config.strict_json import read_json

PEERS = {
    "token_0.2": ("full", "lora", "lora_2", "random", "least_used", "shared"),
    "token_0.4": ("full", "lora", "lora_2", "shared"),
}
NOT_DOMAINS = ("search",)


@dataclass(frozen=True)
class Results:
    """bases: {seed: its base}. arms: {arm: {seed: its training at the learning rate that the search chose}}.
    search: {arm: {rate: the first seed's training}}. Only what is finished."""

    settings: Settings
    task: str
    bases: dict[int, dict]
    arms: dict[str, dict[int, dict]]
    search: dict[str, dict[float, dict]]

    @property
    def general(self) -> list[str]:
        losses = next(iter(self.bases.values()))["losses"]
        return [name for name in losses if name not in (*NOT_DOMAINS, self.task)]

    def curve(self, seed: int, run: dict) -> list[tuple[float, float]]:
        """(loss on the task, mean loss over the general domains) of the base and along a training from it."""
        points = [self.bases[seed]["losses"], *run["trace"].values()]
        return [(losses[self.task], statistics.fmean(losses[name] for name in self.general)) for losses in points]

    def end(self, arm: str, seed: int) -> tuple[float, float]:
        """(task, general) losses at the end; of the arm "base" before any adaptation."""
        if arm == "base":
            return self.curve(seed, {"trace": {}})[0]
        return self.curve(seed, self.arms[arm][seed])[-1]

    def seeds(self, *arms: str) -> list[int]:
        """The seeds for which all these arms are finished."""
        return [seed for seed in self.bases if all(arm == "base" or seed in self.arms.get(arm, {}) for arm in arms)]


def job_file(folder: Path, seed: int, arm: str, rate: float) -> Path:
    return folder / f"seed{seed}-{arm}-{rate:g}.json"


def collect(folder: Path, settings: Settings, arms: Sequence[str]) -> Results:
    """Read what is finished in a folder."""
    bases = _read({seed: job_file(folder, seed, "base", settings.base_rate) for seed in settings.seeds})
    search = {a: _read({r: job_file(folder, settings.seeds[0], a, r) for r in settings.rates}) for a in arms}
    chosen = {}
    for arm in arms:
        rate = best_rate(folder, settings, arm)
        files = {} if rate is None else {seed: job_file(folder, seed, arm, rate) for seed in settings.seeds}
        chosen[arm] = _read(files)
    task = read_json(folder / "identity.json")["task"]
    return Results(settings, task, bases, chosen, search)


def best_rate(folder: Path, settings: Settings, arm: str) -> float | None:
    """The learning rate with the lowest loss on the windows of the search, None before all are finished."""
    found = _read({rate: job_file(folder, settings.seeds[0], arm, rate) for rate in settings.rates})
    if len(found) < len(settings.rates):
        return None
    return min(found, key=lambda rate: found[rate]["trace"][str(settings.steps)]["search"])


def general_at(curve: Sequence[tuple[float, float]], task_loss: float) -> float | None:
    """The general loss where a training first reached `task_loss` on the task, on straight lines between its points;
    None where it never did."""
    for (task_a, general_a), (task_b, general_b) in itertools.pairwise(curve):
        if task_b <= task_loss < task_a:
            return general_a + (general_b - general_a) * (task_a - task_loss) / (task_a - task_b)
    return None


def pairs(results: Results) -> list[tuple[str, str]]:
    """(ESFT, other arm) of every comparison for which a seed is finished."""
    return [(a, b) for a, others in PEERS.items() for b in others if results.seeds(a, b)]


def paired(results: Results, ours: str, peer: str, what: str) -> list[float]:
    """ESFT minus peer for each seed that has both: "task", "general", or "equal" for the general loss at the task loss
    at which the weaker of the two ends."""
    found = []
    for seed in results.seeds(ours, peer):
        pair = values(results, ours, peer, what, seed)
        if pair is not None:
            found.append(pair[0] - pair[1])
    return found


def values(results: Results, ours: str, peer: str, what: str, seed: int) -> tuple[float, float] | None:
    """The two losses of which `paired` gives the difference."""
    ends = [results.end(arm, seed) for arm in (ours, peer)]
    if what != "equal":
        column = ("task", "general").index(what)
        return ends[0][column], ends[1][column]
    level = max(end[0] for end in ends)
    pair = [general_at(results.curve(seed, results.arms[arm][seed]), level) for arm in (ours, peer)]
    return None if None in pair else tuple(pair)


def rows(results: Results) -> list[dict]:
    """Rows of results; losses are compared as ratios too, `difference` is what counts."""
    found = []
    names = {"task": "loss on the task", "general": "general loss", "equal": "general loss at equal task loss"}
    for ours, peer in pairs(results):
        for what, name in names.items():
            losses = {seed: values(results, ours, peer, what, seed) for seed in results.seeds(ours, peer)}
            losses = {seed: pair for seed, pair in losses.items() if pair is not None}
            if losses:
                mine, theirs = (statistics.fmean(pair[i] for pair in losses.values()) for i in (0, 1))
                found.append(
                    _harness.row(f"{name}: {ARMS[ours]}", mine, theirs, ARMS[peer], unit="nats/byte")
                    | _difference({seed: pair[0] - pair[1] for seed, pair in losses.items()})
                )
        counts = [statistics.fmean(run["parameters"] for run in results.arms[arm].values()) for arm in (ours, peer)]
        found.append(_harness.row(f"parameters that train: {ARMS[ours]}", *counts, ARMS[peer], unit="parameters"))
    bases = list(results.bases.values())
    for share in COVERED if bases else ():
        needed = statistics.fmean(base["experts_to_cover"][str(share)] for base in bases)
        uniform = math.ceil(share * results.settings.experts)
        case = f"experts that cover {share:.0%} of the task"
        found.append(_harness.row(case, needed, uniform, "uniform routing", unit="experts"))
    if bases:
        cross, same = (statistics.fmean(base[key] for base in bases) for key in ("overlap_cross", "overlap_same"))
        case = f"experts in common among the top {results.settings.top_k}: two domains"
        found.append(_harness.row(case, cross, same, "two samples of one domain", unit="experts"))
    return found


def _difference(by_seed: dict[int, float]) -> dict:
    mean, sd = spread(list(by_seed.values()))
    return {
        "difference": round(mean, 5),
        "sd": None if math.isnan(sd) else round(sd, 5),
        "by_seed": {str(seed): round(value, 5) for seed, value in by_seed.items()},
    }


def _read(files: dict) -> dict:
    return {key: read_json(file) for key, file in files.items() if file.is_file()}
