"""Results of the experiment on ESFT's quality as Markdown: tables, and what came out of the paper's claims."""

from __future__ import annotations

import math
import statistics

from benchmarks._quality_figures import Results, general_at, paired, pairs
from benchmarks._quality_runs import ARMS, COVERED
from benchmarks._quality_training import shown, verdict


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
            cells += ["", "", shown(task), "", shown(general), "", ""]
        else:
            runs = [results.arms[arm][seed] for seed in seeds]
            parameters = statistics.fmean(run["parameters"] for run in runs)
            per_gain = statistics.fmean(lost) / statistics.fmean(gain)
            cells += [f"{parameters:,.0f}", f"{runs[0]['rate']:g}", shown(task), shown(gain)]
            cells += [shown(general), shown(lost), f"{per_gain:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _differences(results: Results) -> str:
    lines = [
        "\n## Paired differences\n\nESFT minus the other arm, seed by seed: below zero ESFT is better. The last column "
        "is the general loss at the\ntask loss that the weaker of the two ends at, from the losses along the way.\n",
        "| ESFT | minus | task | general | general at equal task loss |",
        "|---|---|---|---|---|",
    ]
    for ours, peer in pairs(results):
        by_seed = {what: paired(results, ours, peer, what) for what in ("task", "general", "equal")}
        cells = [f"{shown(d)} ({', '.join(f'{x:+.3f}' for x in d)})" if d else "not reached" for d in by_seed.values()]
        lines.append(f"| {ARMS[ours]} | {ARMS[peer]} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 3 else ""


def _concentration(results: Results) -> str:
    bases, experts = list(results.bases.values()), results.settings.experts
    lines = [
        f"\n## Concentration\n\n{len(bases)} base models, means over layers and seeds.\n",
        "| share of the task's tokens | experts that cover it | at uniform routing |",
        "|---|---|---|",
    ]
    for share in COVERED:
        found = shown([base["experts_to_cover"][str(share)] for base in bases], digits=1)
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
        lines.append(f"| {name} | {shown([base[key] for base in bases], digits=2)} |")
    return "\n".join(lines)


def _search(results: Results) -> str:
    seed = results.settings.seeds[0]
    ends = {a: {r: results.curve(seed, run) for r, run in runs.items()} for a, runs in results.search.items() if runs}
    if not ends:
        return ""
    lines = [
        f"\n## Search of the learning rate\n\nSeed {seed}; task / general loss at the end. In bold what the search "
        "took, by windows\nthat are not in this table. The last column asks for the best of all rates: the lowest "
        "general loss at which\nthe task loss came to that of ESFT with p=0.2 at its end.\n",
        "| arm | " + " | ".join(f"{rate:g}" for rate in results.settings.rates) + " | general at ESFT's task loss |",
        "|---" * (2 + len(results.settings.rates)) + "|",
    ]
    level = results.end("token_0.2", seed)[0] if seed in results.seeds("token_0.2") else None
    edges = []
    for arm, curves in ends.items():
        chosen = next((run["rate"] for run in results.arms[arm].values()), None)
        cells = []
        for rate in results.settings.rates:
            text = f"{curves[rate][-1][0]:.3f} / {curves[rate][-1][1]:.3f}" if rate in curves else ""
            cells.append(f"**{text}**" if rate == chosen else text)
        if chosen in (results.settings.rates[0], results.settings.rates[-1]):
            edges.append(ARMS[arm])
        levels = [] if level is None else [general_at(curve, level) for curve in curves.values()]
        lowest = min((general for general in levels if general is not None), default=None)
        cells.append("" if lowest is None else f"{lowest:.3f}")
        lines.append(f"| {ARMS[arm]} | {' | '.join(cells)} |")
    if edges:
        lines.append(f"\nAt an edge of what was searched: {', '.join(edges)}.")
    return "\n".join(lines)


def _claims(results: Results) -> str:
    """Claims of the paper whose direction can be tested here, each with what came out."""
    equal = "at equal task loss, at the rates that the search took (not in the paper)"
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
        (f"ESFT forgets less than full fine-tuning {equal}", "token_0.2", "full", "equal"),
        (f"ESFT forgets less than LoRA {equal}", "token_0.2", "lora", "equal"),
        (f"ESFT forgets less than random experts {equal}", "token_0.2", "random", "equal"),
    ]
    lines = []
    for claim, better, worse, what in asked:
        if len(results.seeds(better, worse)) < 3:
            continue  # fewer seeds say nothing
        found = paired(results, better, worse, what)
        if found:
            lines.append(f"- {claim}: {verdict(found)}")
        else:
            lines.append(f"- {claim}: cannot be said, one of them never gets there")
    if not lines:
        return ""
    few, many = (
        statistics.fmean(run["parameters"] for run in results.arms[arm].values()) for arm in ("token_0.2", "token_0.4")
    )
    lines.append(f"- parameters grow with p: twice the p trains {many / few:.2f} times as many")
    return "\n## Claims\n\n" + "\n".join(lines)
