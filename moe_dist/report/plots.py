"""Plots as PNG files, each with the numbers behind it as CSV beside it. Needs no display."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_dist.errors import UserError

LEGEND_ENTRIES = 12  # more lines than that are told apart by a scale of colours


def bars(
    stem: Path, names: Sequence[str], series: Mapping[str, Sequence[float]], *, title: str, x: str, y: str
) -> list[Path]:
    """Bars over `names`, side by side for each of `series`. Writes stem.png and stem.csv and returns both."""

    def paint(axes) -> None:
        width = 0.8 / len(series)
        for number, (label, values) in enumerate(series.items()):
            places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(names))]
            axes.bar(places, values, width, label=label)
        axes.set_xticks(range(len(names)), names)
        if len(series) > 1:
            axes.legend()

    table = [[x, *series], *([name, *values] for name, *values in zip(names, *series.values(), strict=True))]
    return _write(stem, table, paint, title=title, x=x, y=y, wide=len(names) > 16)


def lines(
    stem: Path, places: Sequence[float], series: Mapping[str, Sequence[float]], *, title: str, x: str, y: str
) -> list[Path]:
    """A line over `places` for each of `series`. Writes stem.png and stem.csv and returns both."""

    def paint(axes) -> None:
        from matplotlib import colormaps

        for number, (label, values) in enumerate(series.items()):
            many = len(series) > LEGEND_ENTRIES
            colour = colormaps["viridis"](number / (len(series) - 1)) if many else f"C{number}"
            labelled = not many or number in (0, len(series) - 1)
            axes.plot(places, values, color=colour, linewidth=1.2, label=label if labelled else None)
        axes.grid(alpha=0.3)
        axes.legend()

    table = [[x, *series], *([place, *values] for place, *values in zip(places, *series.values(), strict=True))]
    return _write(stem, table, paint, title=title, x=x, y=y)


def heat_map(
    stem: Path,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    title: str,
    x: str,
    y: str,
) -> list[Path]:
    """A coloured table, values written into it where it is small. Writes stem.png and stem.csv and returns both."""

    def paint(axes) -> None:
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
        axes.figure.colorbar(image)
        small = len(rows) <= 12 and len(columns) <= 12
        axes.set_yticks(range(len(rows)), rows) if len(rows) <= 32 else None
        axes.set_xticks(range(len(columns)), columns, rotation=30) if len(columns) <= 32 else None
        if small:
            for r in range(len(rows)):
                for c in range(len(columns)):
                    axes.text(c, r, f"{values[r][c]:.2f}", ha="center", va="center", backgroundcolor="white")

    table = [[f"{y} / {x}", *columns], *([row, *line] for row, line in zip(rows, values, strict=True))]
    return _write(stem, table, paint, title=title, x=x, y=y)


def _write(stem: Path, table: list[list], paint, *, title: str, x: str, y: str, wide: bool = False) -> list[Path]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib; install it with `pip install 'moe_dist[plots]'`") from None
    figure = Figure(figsize=(10 if wide else 7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    paint(axes)
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize="medium", wrap=True)
    image, numbers = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.csv")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with open(numbers, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
        figure.savefig(image, dpi=110)
    except OSError as error:
        raise UserError(f"{image}: cannot be written: {error.strerror}") from None
    return [image, numbers]
