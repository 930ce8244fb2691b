"""Figures of a run over its steps: loss, load, learning rate, gradient norm, speed."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from moe_dist.report.plots import Plot, lines
from moe_dist.report.record import RunRecord, number

Series = Mapping[int, float]  # step -> value


def curve_plots(record: RunRecord) -> list[Plot]:
    """Those figures for which the run has numbers, losses first."""
    held_out = {f"held-out {name}": record.series("eval", "domains", name, "loss") for name in record.domains}
    norm, clip = record.series("train", "grad_norm"), number(record.setting("train", "clip_norm"))
    clipped = clip is not None and max((value for value in norm.values() if isfinite(value)), default=0.0) > clip / 4
    plots = [
        _over_steps(
            "loss",
            {"training": record.series("train", "loss"), **held_out},
            title="Loss",
            y="loss (nats a label token)",
            meaning="Mean cross-entropy of label tokens: of the batch of that step, and of each held-out domain as a "
            "whole. Lower is better. Where held-out loss rises while training loss falls, the run overfits.",
        ),
        _over_steps(
            "load",
            {
                "busiest expert": record.series("train", "load_max"),
                "busiest rank": record.series("train", "rank_load_max"),
            },
            title="Load of the busiest expert and rank over the mean",
            y="load over mean",
            level=1.0,
            meaning="In the layer where it is worst, in that step alone: tokens of the busiest expert over the mean of "
            "its layer, and the same of the busiest expert-parallel rank, for which the others wait. 1 is balance.",
        ),
        _over_steps(
            "entropy",
            {"lowest layer": record.series("train", "load_entropy")},
            title="Evenness of routing",
            y="entropy over its maximum",
            meaning="Entropy of the experts' shares over log E, in the layer where it is lowest: 1 is an even use of "
            "all experts, 0 is one expert for all tokens.",
        ),
        _over_steps(
            "dead_experts",
            {"experts": record.series("train", "dead_experts")},
            title="Experts without a token",
            y="experts of all layers",
            meaning="Experts to which no token of that step was sent, all layers together. With few tokens a step some "
            "are left out by chance; one that stays out does not learn.",
        ),
        _over_steps(
            "dropped",
            {"largest layer": record.series("train", "dropped")},
            title="Tokens dropped by capacity",
            y="share of slots",
            meaning="Share of (token, expert) pairs that were dropped in that step because their expert was full, in "
            "the layer where it is largest. It stays 0 without moe.capacity_factor.",
        ),
        _over_steps(
            "learning_rate",
            {"learning rate": record.series("train", "lr")},
            title="Learning rate",
            y="learning rate",
            meaning="What the optimizer used in that step.",
        ),
        _over_steps(
            "gradient_norm",
            {"norm before clipping": norm},
            title="Gradient norm",
            y="norm",
            level=clip if clipped else None,
            meaning="2-norm of the gradient of all that trains, over all ranks, before clipping. A line that shoots up "
            "and stays up announces trouble."
            + (f" Gradients above {clip:g} are scaled down to it: the grey line." if clipped else ""),
        ),
        _over_steps(
            "speed",
            {"tokens a second": record.series("train", "tokens_per_second")},
            title="Speed",
            y="tokens a second",
            meaning="Real tokens trained on by all ranks a second, since the line of metrics before; evaluating and "
            "saving are in it.",
        ),
    ]
    return [plot for plot in plots if plot is not None]


def _over_steps(
    name: str, series: Mapping[str, Series], *, title: str, y: str, meaning: str, level: float | None = None
) -> Plot | None:
    series = {label: values for label, values in series.items() if values}
    if not series:
        return None
    steps = sorted({step for values in series.values() for step in values})
    table = {label: [values.get(step) for step in steps] for label, values in series.items()}
    return lines(name, steps, table, title=title, x="step", y=y, meaning=meaning, level=level)
