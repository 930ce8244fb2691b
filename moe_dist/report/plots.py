"""Kinds of plots. A plot is its numbers, how they are painted, and the words that stand in for the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEGEND_ENTRIES = 8  # more lines than that are told apart by a scale of colours
MARKED_POINTS = 40  # a line with fewer points shows each of them
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
# Of middle lightness, so that they stand out from white as well as from a dark page.
PALETTE = ("#2f7de1", "#c65d00", "#1f8a4d", "#9057d1", "#d6404e", "#11848f", "#8f6f1f", "#757d87")
SCALE = ("#2f7de1", "#9057d1", "#c65d00")
DARK, BRIGHT = "#010101", "#ffffff"  # on colours; pure black is the ink of the page, which may be bright

Number = float | int | None  # None: nothing was measured there


@dataclass(frozen=True)
class Plot:
    """One figure.

    name: stem of its files. table: its numbers, a header and rows, as the CSV has them. paint: draws on matplotlib
    axes. words: what the picture shows, for who cannot see it. meaning: how to read it, for everybody.
    """

    name: str
    title: str
    x: str
    y: str
    table: list[list[Any]]
    paint: Callable[[Any], None]
    words: str
    meaning: str = ""
    wide: bool = False


def bars(
    name: str, places: Sequence[str], series: Mapping[str, Sequence[float]], *, title: str, x: str, y: str, meaning=""
) -> Plot:
    """Bars over `places`, side by side for each of `series`."""

    def paint(axes) -> None:
        width = 0.8 / len(series)
        for number, (label, values) in enumerate(series.items()):
            at = [place + (number - (len(series) - 1) / 2) * width for place in range(len(places))]
            axes.bar(at, values, width, label=label, color=PALETTE[number % len(PALETTE)])
        _name_ticks(axes.xaxis, places, at_most=16)
        axes.yaxis.get_major_locator().set_params(integer=all(isinstance(v, int) for s in series.values() for v in s))
        if len(series) > 1:
            _legend(axes)

    table = [[x, *series], *([place, *values] for place, *values in zip(places, *series.values(), strict=True))]
    words = "Bars. " + " ".join(_bar_words(label, places, values, x) for label, values in series.items())
    return Plot(name, title, x, y, table, paint, words, meaning, wide=len(places) > 32)


def lines(
    name: str,
    places: Sequence[float],
    series: Mapping[str, Sequence[Number]],
    *,
    title: str,
    x: str,
    y: str,
    meaning: str = "",
    level: float | None = None,
) -> Plot:
    """A line over `places` for each of `series`. A value that is None is left out, one that is not finite is a gap.

    level: a height to compare with, drawn as a thin line.
    """

    def paint(axes) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        scale = LinearSegmentedColormap.from_list("scale", SCALE)
        many = len(series) > LEGEND_ENTRIES
        for number, (label, values) in enumerate(series.items()):
            points = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
            finite = [value if math.isfinite(value) else math.nan for _, value in points]
            style = {"color": PALETTE[number % len(PALETTE)], "linestyle": DASHES[number % len(DASHES)]}
            if many:
                style = {"color": scale(number / (len(series) - 1))}
            elif len(points) < MARKED_POINTS:
                style["marker"] = "os^Dv"[number % 5]
            labelled = not many or number in (0, len(series) - 1)
            axes.plot(
                [place for place, _ in points], finite, **style,
                linewidth=1.4, markersize=3, label=label if labelled else None,
            )  # fmt: skip
        if level is not None:
            axes.axhline(level, color=PALETTE[-1], linewidth=0.8)
        axes.grid(alpha=0.3)
        known = [value for values in series.values() for value in values if value is not None and math.isfinite(value)]
        if not any(known):
            axes.set_ylim(0, 1)
        elif all(float(value).is_integer() for value in known):
            axes.yaxis.get_major_locator().set_params(integer=True)
        if all(isinstance(place, int) for place in places):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(series) > 1:
            _legend(axes)

    table = [[x, *series], *([place, *values] for place, *values in zip(places, *series.values(), strict=True))]
    words = f"{len(series)} line{'s' * (len(series) > 1)} over {x}. " + " ".join(
        _line_words(label, places, values, x) for label, values in list(series.items())[:LEGEND_ENTRIES]
    )
    words += " ..." if len(series) > LEGEND_ENTRIES else ""
    return Plot(name, title, x, y, table, paint, words, meaning)


def heat_map(
    name: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[Number]],
    *,
    title: str,
    x: str,
    y: str,
    meaning: str = "",
    marked: Collection[tuple[int, int]] = (),
    around_zero: bool = False,
) -> Plot:
    """A coloured table, values written into it where it is small, a dot in each of the cells `marked`.

    around_zero: values have a sign; colours go both ways from zero.
    """
    known = {(r, c): v for r, row in enumerate(values) for c, v in enumerate(row) if v is not None}
    high = max(map(abs, known.values()), default=1.0) or 1.0

    def paint(axes) -> None:
        from matplotlib.colors import to_rgb

        grid = [[math.nan if value is None else value for value in row] for row in values]
        low, colours = (-high, "RdBu_r") if around_zero else (0, "viridis")
        image = axes.imshow(grid, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        axes.figure.colorbar(image, fraction=0.05, pad=0.02)
        _name_ticks(axes.yaxis, rows, at_most=16)
        _name_ticks(axes.xaxis, columns, at_most=16)
        if max(map(len, columns), default=0) > 4 and len(columns) > 4:
            axes.tick_params(axis="x", rotation=30)
        written = len(rows) <= 12 and len(columns) <= 12
        if written:
            for (r, c), value in known.items():
                red, green, blue = to_rgb(image.cmap(image.norm(value)))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                axes.text(
                    c, r, f"{value:.2f}", ha="center", va="center", color=BRIGHT if dark else DARK, fontsize="small"
                )
        if marked:
            left, up = (0.36, 0.32) if written else (0, 0)  # the numbers stand in the middle
            size = max(7, min(25, 2500 / (len(rows) * len(columns))))
            at = [c - left for _, c in marked], [r - up for r, _ in marked]
            axes.scatter(*at, s=size, c=BRIGHT, edgecolors=DARK, linewidths=0.6)

    table = [[f"{y} / {x}", *columns], *([row, *line] for row, line in zip(rows, values, strict=True))]
    words = f"Heat map of {len(rows)} by {len(columns)} cells."
    if known:
        (low_r, low_c), (high_r, high_c) = min(known, key=known.get), max(known, key=known.get)
        words += (
            f" Lowest {known[low_r, low_c]:.3g} at {y} {rows[low_r]}, {x} {columns[low_c]};"
            f" highest {known[high_r, high_c]:.3g} at {y} {rows[high_r]}, {x} {columns[high_c]}."
        )
    return Plot(name, title, x, y, table, paint, words, meaning, wide=len(rows) * len(columns) > 256)


def _legend(axes) -> None:
    """Above the axes, where it hides no line, in as many columns as the names leave room for."""
    longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
    axes.figure.legend(loc="outside upper left", ncols=max(1, min(3, 48 // (longest + 6))))


def _name_ticks(axis, names: Sequence[str], *, at_most: int) -> None:
    """Name every place if there are few of them, else as many as have room."""
    if len(names) <= at_most:
        axis.set_ticks(range(len(names)), names)
        return
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(at_most // 2, integer=True))
    axis.set_major_formatter(
        FuncFormatter(lambda place, _: names[int(place)] if 0 <= place < len(names) and place == int(place) else "")
    )


def _bar_words(label: str, places: Sequence[str], values: Sequence[float], x: str) -> str:
    if not values:
        return f"{label}: nothing."
    low, high = min(values), max(values)
    return (
        f"{label}: from {low:.4g} at {x} {places[list(values).index(low)]} "
        f"to {high:.4g} at {x} {places[list(values).index(high)]}."
    )


def _line_words(label: str, places: Sequence[float], values: Sequence[Number], x: str) -> str:
    points = [(p, v) for p, v in zip(places, values, strict=True) if v is not None and math.isfinite(v)]
    if not points:
        return f"{label}: no finite value."
    (first, start), (last, end) = points[0], points[-1]
    if len(points) == 1:
        return f"{label}: {start:.4g} at {x} {first:,}."
    low, high = min(v for _, v in points), max(v for _, v in points)
    return f"{label}: {start:.4g} at {x} {first:,}, {end:.4g} at {x} {last:,}; lowest {low:.4g}, highest {high:.4g}."
