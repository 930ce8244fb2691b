"""Results of the experiment on Self-MoE's quality: as Markdown, as claims, and as rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import _harness
from benchmarks._quality_training import shown, verdict
from benchmarks._self_moe_arms import ARMS, DEFAULT, MERGED, ROUTED
from benchmarks._self_moe_runs import Settings

ENOUGH = 3  # seeds: fewer say nothing
BASE = "base"


@dataclass(frozen=True)
class Results:
    """jobs: {seed: {name of a training: what came out}}, of what is finished."""

    settings: Settings
    skills: list[str]
    unseen: list[str]
    jobs: dict[int, dict[str, dict]]

    def means(self, job: str, names: Sequence[str]) -> dict[int, float]:
        """{seed: mean loss over these domains}."""
        return {
            seed: statistics.fmean(jobs[job]["loss"][name] for name in names)
            for seed, jobs in self.jobs.items()
            if job in jobs
        }

    def minutes(self) -> float:
        """What all finished trainings took."""
        return sum(job["wall_seconds"] for jobs in self.jobs.values() for job in jobs.values()) / 60

    def lines(self) -> dict[str, str]:
        """Name of each training in the table -> what it is called there."""
        return {BASE: "base", **{f"expert-{skill}": f"specialist: {skill}" for skill in self.skills}, **ARMS}


def render(results: Results) -> str:
    """All tables and claims that something is finished for."""
    made = (_losses, _routing, _chosen, claims)
    return "\n".join(part for part in (make(results) for make in made) if part) or "\nNo base is finished yet."


def _losses(results: Results) -> str:
    lines = []
    for job, name in results.lines().items():
        runs = {seed: jobs[job] for seed, jobs in results.jobs.items() if job in jobs}
        if not runs:
            continue
        first = next(iter(runs.values()))
        cells = [name, str(len(runs)), f"{first['parameters']:,}"]
        for names in ([skill] for skill in results.skills):
            cells.append(shown(list(results.means(job, names).values())))
        cells += [shown(list(results.means(job, names).values())) for names in (results.skills, results.unseen)]
        lines.append("| " + " | ".join(cells) + " |")
    head = [
        "\n## Losses\n\nNats per byte on held-out text, mean ± standard deviation over seeds.\n",
        f"| arm | seeds | trained parameters | {' | '.join(results.skills)} | mean of skills | mean of unseen |",
        "|---" * (5 + len(results.skills)) + "|",
    ]
    return "\n".join(head + lines) if lines else ""


def _routing(results: Results) -> str:
    parts = []
    for arm in (*ROUTED, "joint"):
        shares = [jobs[arm]["share"] for jobs in results.jobs.values() if arm in jobs]
        if not shares:
            continue
        lines = []
        for domain in (*results.skills, *results.unseen):
            cells = [shown([share[domain][skill] for share in shares], digits=2) for skill in results.skills]
            lines.append(f"| {domain} | {' | '.join(cells)} |")
        parts += [f"\n### {ARMS[arm]}\n", f"| text | {' | '.join(results.skills)} |"]
        parts += ["|---" * (1 + len(results.skills)) + "|", *lines]
    head = "\n## Routing\n\nShare of a domain's tokens for which an expert has the largest weight, over all blocks.\n"
    return head + "\n".join(parts) if parts else ""


def _chosen(results: Results) -> str:
    """What the searches took."""
    lines = []
    for job, name in results.lines().items():
        runs = [jobs[job] for jobs in results.jobs.values() if job in jobs]
        if runs and job in MERGED:
            taken = ", ".join(f"{run['density']:g} / {run['weight']:g}" for run in runs)
            lines.append(f"- {name}: density / weight {taken} (seed by seed)")
        elif runs and runs[0].get("steps") and job != BASE:
            edge = runs[0]["rate"] in (results.settings.rates[0], results.settings.rates[-1])
            lines.append(f"- {name}: rate {runs[0]['rate']:g}{', an edge of what was searched' if edge else ''}")
    return "\n## What the searches took\n\n" + "\n".join(lines) if lines else ""


def claims(results: Results) -> str:
    """Claims of the paper whose direction can be tested here, each with what came out."""
    lines = []
    for claim, better, worse in _asked(results):
        both = [seed for seed in better if seed in worse]
        if len(both) >= ENOUGH:
            lines.append(f"- {claim}: {verdict([better[seed] - worse[seed] for seed in both])}")
    owned = _owned(results)
    if len(owned) >= ENOUGH:
        right = sum(all(one.values()) for one in owned.values())
        lines.append(f"- each skill's own expert is first for most of its tokens: in {right} of {len(owned)} seeds")
    return "\n## Claims\n\nBelow zero the claim holds.\n\n" + "\n".join(lines) if lines else ""


def _asked(results: Results) -> list[tuple[str, dict[int, float], dict[int, float]]]:
    skills, unseen = results.skills, results.unseen
    mixture, base = results.means(DEFAULT, skills), results.means(BASE, skills)
    experts = [results.means(f"expert-{skill}", skills) for skill in skills]
    best = {seed: min(one[seed] for one in experts) for seed in base if all(seed in one for one in experts)}
    asked = [
        ("MiXSE is better than the base, mean of skills", mixture, base),
        ("MiXSE is better than the best single specialist, mean of skills", mixture, best),
    ]
    asked += [
        (f"MiXSE is better than {name}, mean of skills", mixture, results.means(arm, skills))
        for arm, name in ARMS.items()
        if arm != DEFAULT
    ]
    for skill in skills:
        others = [name for name in skills if name != skill]
        asked.append(
            (
                f"the specialist for {skill} is worse than the base on the other skills",
                results.means(BASE, others),
                results.means(f"expert-{skill}", others),
            )
        )
    asked.append(
        ("MiXSE is better than the base on unseen domains", results.means(DEFAULT, unseen), results.means(BASE, unseen))
    )
    asked.append(
        (
            "MiXSE is better than instance merging on unseen domains",
            results.means(DEFAULT, unseen),
            results.means("instance", unseen),
        )
    )
    return asked


def _owned(results: Results) -> dict[int, dict[str, bool]]:
    """{seed: {skill: whether its own expert is first for more of its tokens than any other}}."""
    found = {}
    for seed, jobs in results.jobs.items():
        if DEFAULT in jobs:
            share = jobs[DEFAULT]["share"]
            found[seed] = {skill: max(share[skill], key=share[skill].get) == skill for skill in results.skills}
    return found


def rows(results: Results) -> list[dict]:
    """Rows of results: MiXSE against every other arm, `difference` is what counts."""
    found = []
    for where, names in (("skills", results.skills), ("unseen domains", results.unseen)):
        ours = results.means(DEFAULT, names)
        for job, name in results.lines().items():
            other = results.means(job, names)
            both = [seed for seed in ours if seed in other]
            if job == DEFAULT or not both:
                continue
            mine, theirs = (statistics.fmean(one[seed] for seed in both) for one in (ours, other))
            by_seed = {str(seed): round(ours[seed] - other[seed], 5) for seed in both}
            difference = {"difference": round(statistics.fmean(by_seed.values()), 5), "by_seed": by_seed}
            found.append(
                _harness.row(f"loss on {where}: {ARMS[DEFAULT]}", mine, theirs, name, unit="nats/byte") | difference
            )
    return found
