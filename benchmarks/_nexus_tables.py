"""Results of the experiment on Nexus' quality as Markdown and as rows, with what came out of each claim."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import _harness
from benchmarks._nexus_arms import ARMS, EXTENSIONS
from benchmarks._nexus_runs import Settings
from benchmarks._nexus_search import score
from benchmarks._quality_training import shown, verdict

ENOUGH = 3  # seeds: fewer say nothing


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
                first, last = jobs[f"mix-{arm}"]["trace"]["0"], _last(jobs[f"mix-{arm}"])
                found[seed] = {
                    "before": _mean(first["loss"], self.old),
                    "loss": _mean(last["loss"], self.old),
                    "own": _mean({d: share[d] for d, share in last["share"].items()}, self.old)
                    if last["share"]
                    else None,
                }
        return found

    def extended(self, arm: str, budget: int) -> dict[int, dict]:
        """{seed: means over the new domains} for the seeds that have all of them: loss on the new domain, mean loss on
        the old ones, the new expert's share of its own domain's tokens and of the old domains'."""
        found = {}
        for seed, jobs in self.jobs.items():
            names = [f"extend-{domain}-{arm}" for domain in self.new]
            if all(name in jobs for name in names):
                points = [jobs[name]["trace"][str(budget)] for name in names]
                each = [self._point(point, domain) for point, domain in zip(points, self.new, strict=True)]
                found[seed] = {key: statistics.fmean(point[key] for point in each) for key in each[0]}
        return found

    def _point(self, point: dict, domain: str) -> dict:
        return {
            "new": point["loss"][domain],
            "old": _mean(point["loss"], self.old),
            "own": point["share"][domain][domain],
            "taken": statistics.fmean(point["share"][name][domain] for name in self.old),
        }


def render(results: Results) -> str:
    """All tables and claims that something is finished for."""
    made = (_dense, _search, _upcycling, _own, _extension, _claims)
    return "\n".join(part for part in (make(results) for make in made) if part) or "\nNo expert is finished yet."


def _dense(results: Results) -> str:
    """What each dense expert has learned, and what it cost elsewhere."""
    lines = []
    for domain in (*results.old, *results.new):
        found = []
        for jobs in results.jobs.values():
            if f"expert-{domain}" in jobs:
                before, after = (_last(jobs[job])["loss"] for job in ("seed", f"expert-{domain}"))
                others = [name for name in results.old if name != domain]
                found.append((before[domain], after[domain], _mean(before, others), _mean(after, others)))
        if found:
            cells = [domain, str(len(found)), *(shown(values) for values in zip(*found, strict=True))]
            lines.append("| " + " | ".join(cells) + " |")
    head = [
        "\n## Dense experts\n\nMean ± standard deviation over seeds.\n",
        "| domain | seeds | seed, on it | its expert, on it | seed, on the other old ones | its expert, on those |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(head + lines) if lines else ""


def _search(results: Results) -> str:
    rates, first = results.settings.rates, results.settings.seeds[0]
    lines = []
    for stage, name in (("mix", "linear, upcycled"), ("extend", "linear, append")):
        scores = [score(results.jobs[first], stage, rate, old=results.old, new=results.new) for rate in rates]
        if None not in scores:
            cells = [f"**{one:.4f}**" if one == min(scores) else f"{one:.4f}" for one in scores]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    head = [
        "\n## Search of the learning rate\n\nIn bold the rate that suits a linear router best: all arms have it. Mean "
        f"losses of seed {first}, on windows that\nare in no other table; of extensions, on new and old domains and at "
        "all budgets.\n",
        f"| | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "|---" * (1 + len(rates)) + "|",
    ]
    return "\n".join(head + lines) if lines else ""


def _upcycling(results: Results) -> str:
    linear = results.mixed("linear")
    lines = []
    for arm, name in ARMS.items():
        found = results.mixed(arm)
        if not found:
            continue
        less = [found[seed]["loss"] - linear[seed]["loss"] for seed in found if seed in linear]
        own = [one["own"] for one in found.values() if one["own"] is not None]
        runs = [jobs[f"mix-{arm}"] for jobs in results.jobs.values() if f"mix-{arm}" in jobs]
        cells = [name, str(len(found)), f"{runs[0]['parameters']:,}", str(runs[0]["steps"])]
        cells += [shown([one[key] for one in found.values()]) for key in ("before", "loss")]
        cells += [shown(less, digits=4) if less and arm != "linear" else "", shown(own, digits=2) if own else ""]
        lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return ""
    head = [
        "\n## Upcycling\n\nMean loss over the domains before and after training, mean ± standard deviation over seeds; "
        "minus linear: below zero\nis better than the linear router of the same seed. Own expert: share of a domain's "
        "tokens that its expert gets\n(BTX gives a token two experts).\n",
        "| arm | seeds | parameters | steps | at step 0 | loss | minus linear | own expert |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(head + lines)


def _own(results: Results) -> str:
    lines = []
    for arm, name in ARMS.items():
        shares = [_last(jobs[f"mix-{arm}"])["share"] for jobs in results.jobs.values() if f"mix-{arm}" in jobs]
        if shares and shares[0]:
            cells = [shown([share[domain][domain] for share in shares], digits=2) for domain in results.old]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    head = [
        "\n### Share of each domain's tokens that its own expert gets, after training\n",
        f"| arm | {' | '.join(results.old)} |",
        "|---" * (1 + len(results.old)) + "|",
    ]
    return "\n".join(head + lines) if lines else ""


def _extension(results: Results) -> str:
    budgets = results.settings.budgets
    kinds = {
        "new": ("Loss on the new domain", 3),
        "old": ("Mean loss on the old domains", 3),
        "own": ("Share of the new domain's tokens that the new expert gets", 2),
        "taken": ("Share of the old domains' tokens that the new expert gets", 2),
    }
    parts = []
    for key, (title, digits) in kinds.items():
        lines = []
        for arm, name in EXTENSIONS.items():
            found = [results.extended(arm, budget) for budget in budgets]
            if found[0]:
                cells = [shown([one[key] for one in by_seed.values()], digits=digits) for by_seed in found]
                lines.append(f"| {name} | {len(found[0])} | {' | '.join(cells)} |")
        if lines:
            steps = " | ".join(f"{budget} steps" for budget in budgets)
            parts += [f"\n### {title}\n", f"| arm | seeds | {steps} |", "|---" * (2 + len(budgets)) + "|", *lines]
    if not parts:
        return ""
    return f"\n## Extension\n\nMeans over the new domains {', '.join(results.new)}, each added alone.\n" + "\n".join(
        parts
    )


def _claims(results: Results) -> str:
    """Claims of the paper, and goals of the default, each with what came out."""
    lines = []
    upcycled = [
        ("Nexus as in the paper has a lower loss than linear (the paper's claim)", "paper", "linear"),
        ("Nexus as in the paper has a lower loss than dense merging (the paper's claim)", "paper", "merging"),
        *((f"the default has a lower loss than {ARMS[arm]}", "prototype", arm) for arm in ARMS if arm != "prototype"),
    ]
    for claim, better, worse in upcycled:
        found, other = results.mixed(better), results.mixed(worse)
        differences = [found[seed]["loss"] - other[seed]["loss"] for seed in found if seed in other]
        if len(differences) >= ENOUGH:
            lines.append(f"- {claim}: {verdict(differences)}")
    wanted = [("paper", "reset"), *(("prototype", arm) for arm in EXTENSIONS if arm != "prototype")]
    for better, worse in wanted:
        for key, where in (("new", "on the new domain"), ("old", "on the old domains")):
            for budget in results.settings.budgets:
                differences = _differences(results, better, worse, key, budget)
                if len(differences) >= ENOUGH:
                    name = "the default" if better == "prototype" else EXTENSIONS[better]
                    claim = f"{name} has a lower loss {where} than {EXTENSIONS[worse]} after {budget} steps"
                    lines.append(f"- {claim}: {verdict(list(differences.values()))}")
    if not lines:
        return ""
    return "\n## Claims\n\nThe goal is that the default beats reset and append everywhere.\n\n" + "\n".join(lines)


def rows(results: Results) -> list[dict]:
    """Rows of results: the default against every other arm, `difference` is what counts."""
    found = []
    ours = results.mixed("prototype")
    for arm, name in ARMS.items():
        other = results.mixed(arm)
        both = [seed for seed in ours if seed in other]
        if arm != "prototype" and both:
            values = {seed: (ours[seed]["loss"], other[seed]["loss"]) for seed in both}
            found.append(_row("loss after upcycling", values, name))
    for arm, name in EXTENSIONS.items():
        for budget in results.settings.budgets if arm != "prototype" else ():
            ours, other = results.extended("prototype", budget), results.extended(arm, budget)
            for key in ("new", "old"):
                values = {seed: (ours[seed][key], other[seed][key]) for seed in ours if seed in other}
                if values:
                    found.append(_row(f"loss on {key} domains, {budget} steps after extension", values, name))
    return found


def _row(case: str, values: dict[int, tuple[float, float]], peer: str) -> dict:
    mine, theirs = (statistics.fmean(pair[i] for pair in values.values()) for i in (0, 1))
    by_seed = {str(seed): round(pair[0] - pair[1], 5) for seed, pair in values.items()}
    difference = {"difference": round(statistics.fmean(by_seed.values()), 5), "by_seed": by_seed}
    return _harness.row(f"{case}: {ARMS['prototype']}", mine, theirs, peer, unit="nats/byte") | difference


def _differences(results: Results, better: str, worse: str, key: str, budget: int) -> dict[int, float]:
    found, other = results.extended(better, budget), results.extended(worse, budget)
    return {seed: found[seed][key] - other[seed][key] for seed in found if seed in other}


def _last(job: dict) -> dict:
    return job["trace"][max(job["trace"], key=int)]


def _mean(values: dict[str, float], names: Sequence[str]) -> float:
    return statistics.fmean(values[name] for name in names)
