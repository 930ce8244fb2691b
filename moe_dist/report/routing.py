"""Where the tokens of a run went: counts of each layer's experts, over stretches of steps and over the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.report.plots import Plot, heat_map
from moe_dist.report.record import RunRecord, by_layer, numbers


@dataclass(frozen=True)
class Window:
    """counts: {layer: [slots of each expert]} over `steps` steps that ended with `last`."""

    last: int
    steps: int
    counts: dict[str, list[int]]

    @property
    def span(self) -> str:
        return f"step {self.last}" if self.steps == 1 else f"steps {self.last - self.steps + 1} to {self.last}"


def windows(record: RunRecord) -> list[Window]:
    """The stretches that the run has counted, of those layers that every one of them has."""
    found = {}
    for entry in record.events.get("experts", []):
        counts = entry.get("counts")
        if isinstance(counts, dict) and isinstance(entry.get("steps"), int):
            counts = {layer: numbers(counts[layer]) for layer in by_layer(counts)}
            used = {layer: slots for layer, slots in counts.items() if are_counts(slots)}
            found[entry["step"]] = Window(entry["step"], entry["steps"], used)
    return [found[step] for step in sorted(found) if found[step].counts]


def whole_run(record: RunRecord) -> dict[str, list[int]]:
    """{layer: [slots of each expert]} over all stretches, {} where nothing was counted."""
    total: dict[str, list[int]] = {}
    for window in windows(record):
        for layer, counts in window.counts.items():
            before = total.get(layer, [0] * len(counts))
            if len(before) == len(counts):
                total[layer] = [a + b for a, b in zip(before, counts, strict=True)]
    return {layer: total[layer] for layer in by_layer(total)}


def relative_load(counts: list[int]) -> list[float]:
    """Each expert's slots over those it would get if all got the same."""
    total = sum(counts)
    return [count * len(counts) / total for count in counts]


def routing_plots(record: RunRecord) -> list[Plot]:
    """Heat maps of layer by expert: over the whole run, and how the last stretch differs from the first."""
    total, found = whole_run(record), windows(record)
    if not total:
        return []
    layers = list(total)
    experts = max(map(len, total.values()))
    names = [str(expert) for expert in range(experts)]
    load = {layer: filled(relative_load(total[layer]), experts) for layer in layers}
    trained = _trained(record)
    dots = {(r, e) for r, layer in enumerate(layers) for e in trained.get(layer, []) if e < experts}
    counted = sum(window.steps for window in found)
    plots = [
        heat_map(
            "routing",
            layers,
            names,
            list(load.values()),
            title="Load of each expert over an even share",
            x="expert",
            y="layer",
            marked=dots,
            meaning=f"Tokens that the router sent to each expert in {counted:,} steps of training, over what it would "
            "get if all experts of its layer got the same: 1 is even, 2 is twice that, 0 is never."
            + (" A dot marks an expert that trains." if dots else ""),
        )
    ]
    first, last = found[0], found[-1]
    shared = [layer for layer in layers if len(first.counts.get(layer, [])) == len(last.counts.get(layer, [])) > 0]
    if len(found) > 1 and shared:
        start, end = ([relative_load(window.counts[layer]) for layer in shared] for window in (first, last))
        change = [
            filled([after - before for before, after in zip(*rows, strict=True)], experts)
            for rows in zip(start, end, strict=True)
        ]
        plots.append(
            heat_map(
                "routing_change",
                shared,
                names,
                change,
                title="Change of the load of each expert in the run",
                x="expert",
                y="layer",
                around_zero=True,
                meaning=f"Load over an even share in {last.span}, less that in {first.span}: above 0, an expert is "
                "used more than at the start. A few steps hold few tokens, so small changes are chance.",
            )
        )
    return plots


def are_counts(slots: list) -> bool:
    """Whether a list is what experts got: whole numbers, not all of them zero."""
    return any(slots) and all(isinstance(count, int) and count >= 0 for count in slots)


def filled(values: Sequence[float], length: int) -> list[float | None]:
    """`values`, then None up to that length: a layer may have fewer experts than another."""
    return [*values, *[None] * (length - len(values))]


def _trained(record: RunRecord) -> dict[str, list[int]]:
    """{layer: expert ids that train} where the configuration chooses some of them."""
    chosen = record.setting("trainable", "experts")
    if not isinstance(chosen, dict):
        return {}
    return {str(layer): [e for e in numbers(ids) if isinstance(e, int) and e >= 0] for layer, ids in chosen.items()}
