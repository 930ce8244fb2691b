"""What came out of each claim in the experiment on Nexus' quality, seed by seed, and as rows."""

from __future__ import annotations

import statistics

from benchmarks import _harness
from benchmarks._nexus_arms import ARMS, EXTENSIONS
from benchmarks._nexus_results import Results
from benchmarks._quality_training import shown, verdict

ENOUGH = 3  # seeds: fewer say nothing
AXES = {"new": "on the new domain", "old": "on the old domains"}


def paired(results: Results) -> str:
    """The default minus every other extension."""
    budgets = results.settings.budgets
    parts = []
    for axis, where in AXES.items():
        lines = []
        for arm, name in EXTENSIONS.items():
            found = [list(_differences(results, "prototype", arm, axis, budget).values()) for budget in budgets]
            if arm != "prototype" and found[0]:
                counted = [f"{shown(one)} ({sum(less < 0 for less in one)}/{len(one)})" for one in found]
                lines.append(f"| {name} | {' | '.join(counted)} |")
        if lines:
            steps = " | ".join(f"{budget} steps" for budget in budgets)
            parts += [f"\n### The default's loss {where}, minus that of others\n", f"| arm | {steps} |"]
            parts += ["|---" * (1 + len(budgets)) + "|", *lines]
    head = "\n## Paired differences\n\nBelow zero the default is better. Mean ± standard deviation over seeds and new "
    return head + "domains; in brackets in how many\nof those it is below zero.\n" + "\n".join(parts) if parts else ""


def claims(results: Results) -> str:
    """Claims of the paper, and goals of the default, each with what came out."""
    lines = []
    upcycled = [
        ("Nexus as in the paper has a lower loss than linear (the paper: scores 2.1 % higher)", "paper", "linear"),
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
        for axis, where in AXES.items():
            found = {b: _differences(results, better, worse, axis, b) for b in results.settings.budgets}
            if len({seed for differences in found.values() for seed, _ in differences}) >= ENOUGH:
                name = "the default" if better == "prototype" else EXTENSIONS[better]
                said = " (the paper: scores 18.8 % higher)" if (better, axis) == ("paper", "new") else ""
                claim = f"{name} has a lower loss {where} than {EXTENSIONS[worse]}{said}"
                values = [value for differences in found.values() for value in differences.values()]
                lines.append(f"- {claim}: {verdict(values, what='seeds, domains and budgets')}")
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


def _differences(results: Results, better: str, worse: str, axis: str, budget: int) -> dict[tuple[int, str], float]:
    """{(seed, new domain): loss of one extension minus that of the other}."""
    found, other = results.each_extended(better, budget), results.each_extended(worse, budget)
    return {one: found[one][axis] - other[one][axis] for one in found if one in other}
