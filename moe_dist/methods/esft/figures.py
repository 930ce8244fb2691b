"""The figures of a selection: experts of each layer, coverage curves, overlap between tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moe_dist.config.expert_files import Summary
from moe_dist.methods.esft.selection import Choice, coverage_curve, overlap
from moe_dist.report.plots import bars, heat_map, lines

TOP = 6  # experts of a layer that are compared between tasks where a summary does not say how many a token gets


def draw(tasks: Mapping[str, Summary], choice: Choice, *, kind: str, folder: str | Path) -> list[Path]:
    """Draw the figures into `folder`, each as PNG with its numbers as CSV beside it; the files written.

    tasks: path of each task's scores -> the scores; the first task is the one that `choice` was made from. With one
    task alone there is no overlap to draw.
    """
    scores = {path: summary.of_kind(kind, where=path) for path, summary in tasks.items()}
    names = dict(zip(tasks, _short_names(list(tasks)), strict=True))
    first = next(iter(tasks))
    layers = choice.record["layers"]
    written = bars(
        Path(folder) / "experts_per_layer",
        list(layers),
        {"experts that train": [figures["selected"] for figures in layers.values()]},
        title=f"Experts that train in each layer ({names[first]})",
        x="layer",
        y="experts",
    )
    experts = max(len(score) for score in scores[first].values())
    curves = {f"layer {layer}": coverage_curve(score) for layer, score in scores[first].items()}
    written += lines(
        Path(folder) / "coverage",
        list(range(experts + 1)),
        {name: curve + [curve[-1]] * (experts + 1 - len(curve)) for name, curve in curves.items()},
        title=f"Share of the {kind} score that the highest experts cover ({names[first]})",
        x="experts, highest score first",
        y="share covered",
    )
    if len(tasks) > 1:
        top = next((int(s.extra["top_k"]) for s in tasks.values() if "top_k" in s.extra), TOP)
        written += heat_map(
            Path(folder) / "overlap",
            list(names.values()),
            list(names.values()),
            [[overlap(scores[a], scores[b], top=top) for b in tasks] for a in tasks],
            title=f"Shared experts among the {top} highest of a layer, mean over layers",
            x="task",
            y="task",
        )
    return written


def _short_names(paths: list[str]) -> list[str]:
    """Names that tell paths apart: the files' own, else their folders', else the whole paths."""
    for name in (lambda path: path.stem, lambda path: path.absolute().parent.name):
        names = [name(Path(path)) for path in paths]
        if len(set(names)) == len(names):
            return names
    return paths
