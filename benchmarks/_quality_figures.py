"""Results of the experiment on ESFT's quality: read, compared seed by seed, as text and as rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _harness
from benchmarks._quality_runs import ARMS, COVERED, Settings
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
        return [seed for seed in self.bases if all(arm == "base" or seed in self.arms[arm] for arm in arms)]


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


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (of the sample; nan for one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def render(results: Results) -> str:
    """All tables and claims, in Markdown."""
    if not results.bases:
        return "\nNo base model is finished yet."
    parts = [_arms(results), _differences(results), _concentration(results), _search(results), _claims(results)]
    return "\n".join(part for part in parts if part)


def _arms(results: Results) -> str:
    lines = [
        "\n## Arms\n\nMean ± standard deviation over seeds. Gain: what the loss on the task fell by; forgetting: what "
        "the mean loss\nover the general domains rose by, both against the base of the same seed.\n",
        "| arm | seeds | parameters that train | rate | task | gain | general | forgetting | forgetting / gain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, name in {"base": "base, not adapted", **ARMS}.items():
        if arm != "base" and not results.arms.get(arm):
            continue
        seeds = results.seeds(arm)
        ends, starts = ([results.end(a, seed) for seed in seeds] for a in (arm, "base"))
        task, general = ([end[i] for end in ends] for i in (0, 1))
        gain = [start[0] - end[0] for start, end in zip(starts, ends, strict=True)]
        lost = [end[1] - start[1] for start, end in zip(starts, ends, strict=True)]
        cells = [name, str(len(seeds))]
        if arm == "base":
            cells += ["", "", _shown(task), "", _shown(general), "", ""]
        else:
            runs = [results.arms[arm][seed] for seed in seeds]
            parameters = statistics.fmean(run["parameters"] for run in runs)
            per_gain = statistics.fmean(lost) / statistics.fmean(gain)
            cells += [f"{parameters:,.0f}", f"{runs[0]['rate']:g}", _shown(task), _shown(gain)]
            cells += [_shown(general), _shown(lost), f"{per_gain:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _differences(results: Results) -> str:
    lines = [
        "\n## Paired differences\n\nESFT minus the other arm, seed by seed: below zero ESFT is better. The last column "
        "is the general loss at the\ntask loss that the weaker of the two ends at, from the losses along the way.\n",
        "| ESFT | minus | task | general | general at equal task loss |",
        "|---|---|---|---|---|",
    ]
    for ours, peer in _pairs(results):
        by_seed = {what: paired(results, ours, peer, what) for what in ("task", "general", "equal")}
        cells = [f"{_shown(d)} ({', '.join(f'{x:+.3f}' for x in d)})" if d else "not reached" for d in by_seed.values()]
        lines.append(f"| {ARMS[ours]} | {ARMS[peer]} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 3 else ""


def _pairs(results: Results) -> list[tuple[str, str]]:
    return [(a, b) for a, others in PEERS.items() for b in others if b in results.arms and results.seeds("base", a, b)]


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


def _concentration(results: Results) -> str:
    bases, experts = list(results.bases.values()), results.settings.experts
    lines = [
        f"\n## Concentration\n\n{len(bases)} base models, means over layers and seeds.\n",
        "| share of the task's tokens | experts that cover it | at uniform routing |",
        "|---|---|---|",
    ]
    for share in COVERED:
        found = _shown([base["experts_to_cover"][str(share)] for base in bases], digits=1)
        lines.append(f"| {share:.0%} | {found} of {experts} | {math.ceil(share * experts)} |")
    top = results.settings.top_k
    chance = top * top / experts
    lines.append(f"\nOf the {top} experts of a layer that are used most (chance: {chance:.1f}):\n")
    lines += ["| samples | in common |", "|---|---|"]
    for key, name in (
        ("overlap_same", "two of the same domain"),
        ("overlap_cross", "two of different domains"),
        ("overlap_task", "the task and a general domain"),
    ):
        lines.append(f"| {name} | {_shown([base[key] for base in bases], digits=2)} |")
    return "\n".join(lines)


def _search(results: Results) -> str:
    seed = results.settings.seeds[0]
    ends = {a: {r: results.curve(seed, run) for r, run in runs.items()} for a, runs in results.search.items() if runs}
    if not ends:
        return ""
    lines = [
        f"\n## Search of the learning rate\n\nSeed {seed}; task / general loss at the end. In bold what the search "
        "took, by windows\nthat are not in this table.\n",
        "| arm | " + " | ".join(f"{rate:g}" for rate in results.settings.rates) + " |",
        "|---" * (1 + len(results.settings.rates)) + "|",
    ]
    edges = []
    for arm, curves in ends.items():
        chosen = next((run["rate"] for run in results.arms[arm].values()), None)
        cells = []
        for rate in results.settings.rates:
            text = f"{curves[rate][-1][0]:.3f} / {curves[rate][-1][1]:.3f}" if rate in curves else ""
            cells.append(f"**{text}**" if rate == chosen else text)
        if chosen in (results.settings.rates[0], results.settings.rates[-1]):
            edges.append(ARMS[arm])
        lines.append(f"| {ARMS[arm]} | {' | '.join(cells)} |")
    if edges:
        lines.append(f"\nAt an edge of what was searched: {', '.join(edges)}.")
    return "\n".join(lines)


def _claims(results: Results) -> str:
    """Claims of the paper whose direction can be tested here, each with what came out."""
    asked = [
        ("ESFT forgets less than full fine-tuning", "token_0.2", "full", "general"),
        ("ESFT forgets less than LoRA", "token_0.2", "lora", "general"),
        ("ESFT forgets less than LoRA of rank 2", "token_0.2", "lora_2", "general"),
        ("ESFT gains more on the task than random experts", "token_0.2", "random", "task"),
        ("ESFT gains more on the task than the least used experts", "token_0.2", "least_used", "task"),
        ("ESFT gains more on the task than LoRA", "token_0.2", "lora", "task"),
        ("ESFT gains more on the task than LoRA of rank 2", "token_0.2", "lora_2", "task"),
        ("ESFT gains more on the task than shared experts alone (Table 3)", "token_0.2", "shared", "task"),
        ("full fine-tuning gains more on the task than ESFT (Table 3)", "full", "token_0.2", "task"),
        ("ESFT forgets less than shared experts alone (Table 3)", "token_0.2", "shared", "general"),
        ("shared experts alone forget less than full fine-tuning (Table 3)", "shared", "full", "general"),
        ("a larger p gains more on the task", "token_0.4", "token_0.2", "task"),
        ("ESFT forgets less than full fine-tuning at equal task loss (not in the paper)", "token_0.2", "full", "equal"),
        ("ESFT forgets less than LoRA at equal task loss (not in the paper)", "token_0.2", "lora", "equal"),
        ("ESFT forgets less than random experts at equal task loss (not in the paper)", "token_0.2", "random", "equal"),
    ]
    lines = []
    for claim, better, worse, what in asked:
        if better not in results.arms or worse not in results.arms or len(results.seeds(better, worse)) < 3:
            continue  # fewer seeds say nothing
        found = paired(results, better, worse, what)
        if found:
            right = sum(difference < 0 for difference in found)
            verdict = "holds" if right == len(found) else "**does not hold**" if right == 0 else "**undecided**"
            lines.append(f"- {claim}: {verdict} ({right} of {len(found)} seeds, {_shown(found)})")
        else:
            lines.append(f"- {claim}: cannot be said, one of them never gets there")
    return "\n## Claims\n\n" + "\n".join(lines) if lines else ""


def rows(results: Results) -> list[dict]:
    """Rows of results; losses are compared as ratios too, `difference` is what counts."""
    found = []
    names = {"task": "loss on the task", "general": "general loss", "equal": "general loss at equal task loss"}
    for ours, peer in _pairs(results):
        for what, name in names.items():
            pairs = {seed: values(results, ours, peer, what, seed) for seed in results.seeds(ours, peer)}
            pairs = {seed: pair for seed, pair in pairs.items() if pair is not None}
            if pairs:
                mine, theirs = (statistics.fmean(pair[i] for pair in pairs.values()) for i in (0, 1))
                found.append(
                    _harness.row(f"{name}: {ARMS[ours]}", mine, theirs, ARMS[peer], unit="nats/byte")
                    | _difference({seed: pair[0] - pair[1] for seed, pair in pairs.items()})
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


def _shown(values: Sequence[float], *, digits: int = 3) -> str:
    mean, sd = spread(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:.{digits}f}")


def _read(files: dict) -> dict:
    return {key: read_json(file) for key, file in files.items() if file.is_file()}
