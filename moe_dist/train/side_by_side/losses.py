"""What training has brought: the held-out loss of the start and of every expert, domain by domain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_dist.config.strict_json import read_json, write_json
from moe_dist.train import run_folder
from moe_dist.train.side_by_side.plan import SideBySide

Figures = dict[str, dict[str, Any]]  # domain -> loss, perplexity, tokens


def report(plan: SideBySide) -> str:
    """The table of losses, also left in the plan's report; empty where nothing was held out."""
    runs = {name: Path(config.run.dir) for name, config in plan.experts.items()}
    rows = {plan.terms.start: start_figures(plan), **{name: _last_eval(run) for name, run in runs.items()}}
    write_json(plan.report, rows)
    domains = list(dict.fromkeys(domain for figures in rows.values() for domain in figures))
    if not domains:
        return ""
    width = max(map(len, [*rows, "held-out loss"]))
    lines = [f"{'held-out loss':<{width}}" + "".join(f"{domain:>12}" for domain in domains)]
    for name, figures in rows.items():
        losses = (f"{figures[domain]['loss']:>12.4f}" if domain in figures else f"{'':>12}" for domain in domains)
        lines.append(f"{name:<{width}}" + "".join(losses))
    return "\n".join(lines)


def keep_start_figures(plan: SideBySide, figures: Figures) -> None:
    write_json(plan.report, {plan.terms.start: figures})


def start_figures(plan: SideBySide) -> Figures:
    """The held-out figures of the start, if they are known from before."""
    return read_json(plan.report)[plan.terms.start] if plan.report.is_file() else {}


def _last_eval(run: Path) -> Figures:
    lines = (json.loads(line) for line in (run / run_folder.METRICS).read_text().splitlines())
    found = [line["domains"] for line in lines if line["event"] == "eval"]
    return found[-1] if found else {}
