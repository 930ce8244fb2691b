"""Results of the experiment on Nexus' quality as Markdown."""

from __future__ import annotations

from benchmarks._nexus_arms import ARMS, EXTENSIONS
from benchmarks._nexus_claims import claims, paired
from benchmarks._nexus_results import Results, last, mean
from benchmarks._nexus_search import score
from benchmarks._quality_training import shown


def render(results: Results) -> str:
    """All tables and claims that something is finished for."""
    made = (_dense, _search, _upcycling, _own, _extension, paired, claims)
    return "\n".join(part for part in (make(results) for make in made) if part) or "\nNo expert is finished yet."


def _dense(results: Results) -> str:
    """What each dense expert has learned, and what it cost elsewhere."""
    lines = []
    for domain in (*results.old, *results.new):
        found = []
        for jobs in results.jobs.values():
            if f"expert-{domain}" in jobs:
                before, after = (last(jobs[job])["loss"] for job in ("seed", f"expert-{domain}"))
                others = [name for name in results.old if name != domain]
                found.append((before[domain], after[domain], mean(before, others), mean(after, others)))
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
        shares = [last(jobs[f"mix-{arm}"])["share"] for jobs in results.jobs.values() if f"mix-{arm}" in jobs]
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
