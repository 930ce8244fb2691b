"""What branching has brought: the held-out loss of the seed and of every expert, domain by domain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_dist.config.strict_json import read_json, write_json
from moe_dist.train import run_folder

REPORT = "branch.json"
Figures = dict[str, dict[str, Any]]  # domain -> loss, perplexity, tokens


def report(out: Path, experts: dict[str, Path]) -> str:
    """The table of losses, also left in `out`/branch.json; empty where nothing was held out.

    experts: domain -> run folder of its expert.
    """
    rows = {"seed": seed_figures(out), **{name: _last_eval(run) for name, run in experts.items()}}
    write_json(out / REPORT, rows)
    domains = list(dict.fromkeys(domain for figures in rows.values() for domain in figures))
    if not domains:
        return ""
    width = max(map(len, [*rows, "held-out loss"]))
    lines = [f"{'held-out loss':<{width}}" + "".join(f"{domain:>12}" for domain in domains)]
    for name, figures in rows.items():
        losses = (f"{figures[domain]['loss']:>12.4f}" if domain in figures else f"{'':>12}" for domain in domains)
        lines.append(f"{name:<{width}}" + "".join(losses))
    return "\n".join(lines)


def keep_seed_figures(out: Path, figures: Figures) -> None:
    write_json(out / REPORT, {"seed": figures})


def seed_figures(out: Path) -> Figures:
    """The seed's held-out figures, if they are known from before."""
    return read_json(out / REPORT)["seed"] if (out / REPORT).is_file() else {}


def _last_eval(run: Path) -> Figures:
    lines = (json.loads(line) for line in (run / run_folder.METRICS).read_text().splitlines())
    found = [line["domains"] for line in lines if line["event"] == "eval"]
    return found[-1] if found else {}
