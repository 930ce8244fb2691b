"""What an evaluation leaves: tables for people, and a folder of results."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from moe_dist import __version__
from moe_dist.config.save import redact
from moe_dist.data.atomic import new_folder, write_durably
from moe_dist.methods.self_moe.evaluation.config import EvaluateConfig
from moe_dist.methods.self_moe.evaluation.evaluate import Evaluation, SetResult

RESULTS = "results.json"


def figures(result: SetResult, metric: str) -> dict[str, Any]:
    """score: the share of items that are right; standard_error: of that share; unfinished: cut at max_tokens."""
    count = len(result.rows)
    right = sum(row["right"] for row in result.rows)
    share = right / count
    return {
        "metric": metric,
        "items": count,
        "right": right,
        "score": share,
        "standard_error": math.sqrt(share * (1 - share) / count),
        "no_answer": sum(row["answer"] is None for row in result.rows),
        "unfinished": sum(not row["finished"] for row in result.rows),
    }


def shares(result: SetResult, experts: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Over all blocks and tokens, for each expert: first, the share of tokens that it has the largest weight for;
    chosen, that it has a part in; weight, its mean weight."""
    total = sum(result.routing.values())
    tokens = total[0].sum().clamp(min=1)
    columns = (total / tokens).T.tolist()
    return {
        name: dict(zip(("first", "chosen", "weight"), column, strict=True))
        for name, column in zip(experts, columns, strict=True)
    }


def summary(config: EvaluateConfig, found: Evaluation) -> dict[str, Any]:
    """All figures, JSON-able."""
    metrics = {held_out.name: held_out.metric for held_out in config.evaluate.sets}
    sets = {name: figures(result, metrics[name]) for name, result in found.sets.items()}
    tree = {"sets": sets, "average": sum(f["score"] for f in sets.values()) / len(sets) if sets else None}
    if found.experts:
        tree["routing"] = {name: shares(result, found.experts) for name, result in found.sets.items()}
    tree["contamination"] = {report.name: {"items": report.total, "overlap": report.found} for report in found.overlaps}
    versions = {"moe_dist": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return tree | {"model": found.identity, "versions": versions, "config": redact(asdict(config))}


def render(tree: dict[str, Any]) -> str:
    """The tables of a `summary`."""
    lines = []
    if tree["sets"]:
        lines += _sets(tree)
    if routing := tree.get("routing"):
        experts = list(next(iter(routing.values())))
        lines += ["", "share of tokens that an expert has the largest weight for", " " * 20 + _cells(experts)]
        for name, row in routing.items():
            lines.append(f"{name:<20}" + _cells([f"{row[expert]['first']:.1%}" for expert in experts]))
    for task, row in tree.get("harness", {}).items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float))
        lines.append(f"{task:<20} {shown} ({row['shots']} shots, {row['items']} items)")
    return "\n".join(lines)


def _sets(tree: dict[str, Any]) -> list[str]:
    lines = [f"{'set':<20} {'metric':<12} {'score':>7} {'±':>6} {'right':>7} {'items':>7} {'cut':>5} {'no answer':>10}"]
    for name, row in tree["sets"].items():
        lines.append(
            f"{name:<20} {row['metric']:<12} {row['score']:>7.1%} {row['standard_error']:>6.1%} {row['right']:>7,} "
            f"{row['items']:>7,} {row['unfinished']:>5,} {row['no_answer']:>10,}"
        )
    if len(tree["sets"]) > 1:
        lines.append(f"{'average':<20} {'':<12} {tree['average']:>7.1%}")
    return lines


def write(folder: Path, tree: dict[str, Any], found: Evaluation) -> None:
    """Write SET.jsonl for every set and results.json; the folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder, marker=RESULTS) as place:
        for name, result in found.sets.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows]
            write_durably(place / f"{name}.jsonl", "".join(lines).encode("utf-8", "replace"))
        write_durably(
            place / RESULTS, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        )


def _cells(words: list[str]) -> str:
    return "".join(f" {word[:13]:>13}" for word in words)
