"""The figures of a selection: experts of each layer, coverage curves, overlap between tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moe_dist.config.expert_files import Summary
from moe_dist.methods.esft.selection import Choice, Scores, coverage_curve, overlap
from moe_dist.report.plots import Plot, bars, heat_map, lines

TOP = 6  # experts of a layer that are compared between tasks where a summary does not say how many a token gets


def selection_plots(tasks: Mapping[str, Summary], choice: Choice, *, kind: str) -> list[Plot]:
    """The figures of a selection.

    tasks: path of each task's scores -> the scores; the first task is the one that `choice` was made from. With one
    task alone there is no overlap to draw.
    """
    scores = {path: summary.of_kind(kind, where=path) for path, summary in tasks.items()}
    names = short_names(list(tasks))
    first = next(iter(tasks))
    counts = {layer: figures["selected"] for layer, figures in choice.record["layers"].items()}
    plots = [
        experts_per_layer(counts, of=names[0]),
        coverage(scores[first], of=f"{kind} score, {names[0]}"),
    ]
    if len(tasks) > 1:
        chosen = [summary.extra.get("top_k") for summary in tasks.values()]
        plots.append(task_overlap(dict(zip(names, scores.values(), strict=True)), top=compared(chosen)))
    return plots


def experts_per_layer(counts: Mapping[str, int], *, of: str) -> Plot:
    """Bars: how many experts of each layer train. of: what was selected for, as it goes into the title."""
    return bars(
        "experts_per_layer",
        list(counts),
        {"experts that train": list(counts.values())},
        title=f"Experts that train in each layer ({of})",
        x="layer",
        y="experts",
        meaning="Few experts are enough where the router sends the task to few; many where it spreads the task.",
    )


def coverage(scores: Scores, *, of: str) -> Plot:
    """A curve for each layer: the share of its scores that its 0, 1, 2, ... highest experts cover."""
    experts = max(len(score) for score in scores.values())
    curves = {f"layer {layer}": coverage_curve(score) for layer, score in scores.items()}
    return lines(
        "coverage",
        list(range(experts + 1)),
        {name: curve + [curve[-1]] * (experts + 1 - len(curve)) for name, curve in curves.items()},
        title=f"Share that the highest experts of a layer cover ({of})",
        x="experts, highest score first",
        y="share covered",
        meaning="A curve that rises steeply is a layer in which few experts do most of the work on this text; a "
        "straight line is a layer that uses all experts alike.",
    )


def task_overlap(scores: Mapping[str, Scores], *, top: int) -> Plot:
    """A table of tasks by tasks: how many of the `top` highest experts of a layer they share, as a mean over layers."""
    names = list(scores)
    return heat_map(
        "overlap",
        names,
        names,
        [[overlap(scores[a], scores[b], top=top) for b in names] for a in names],
        title=f"Shared experts among the {top} highest of a layer, mean over layers",
        x="task",
        y="task",
        meaning=f"Two tasks that share all of them have {top}, as each has with itself; two that use different "
        "experts have 0, so that what one trains leaves the other alone.",
    )


def compared(experts_per_token: Iterable[object]) -> int:
    """How many of the highest experts tasks are compared by: as many as a token gets, by the first that knows it."""
    return next((k for k in experts_per_token if type(k) is int and k > 0), TOP)


def short_names(paths: Sequence[str]) -> list[str]:
    """Names that tell paths apart: the files' own, else their folders', else the whole paths."""
    for name in (lambda path: path.stem, lambda path: path.absolute().parent.name):
        names = [name(Path(path)) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(paths)
