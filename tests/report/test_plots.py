"""Plots alone: their numbers, their words, and SVG that may stand beside other SVG in one page."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from moe_dist.report.plots import PALETTE, SCALE, bars, heat_map, lines

pytest.importorskip("matplotlib")
from moe_dist.report.drawing import png, svg
from moe_dist.report.files import csv_text

ODD = ("$x^2$", "_hidden", '<script>"', "a & b", "日本")


def odd_plots():
    return [
        bars("bars", ODD, {"a": [1, 2, 3, 4, 5], "b": [0, 0, 0, 0, 0]}, title=ODD[0], x="x", y="y"),
        lines("lines", [1, 2, 3], {ODD[0]: [1.0, None, math.nan], "none": [None] * 3}, title=ODD[2], x="x", y="y"),
        lines("many", [0], {f"layer {n}": [n] for n in range(30)}, title="many", x="x", y="y", level=1.0),
        heat_map("small", ODD, ["a", "b"], [[0.1, None]] * 5, title="t", x="x", y="y", marked={(0, 1)}),
        heat_map("zero", ["0"], ["a"], [[0.0]], title="t", x="x", y="y", around_zero=True),
        heat_map("big", [*map(str, range(40))], [*map(str, range(100))], [[1.0] * 100] * 40, title="t", x="x", y="y"),
    ]  # fmt: skip


@pytest.mark.parametrize("plot", odd_plots(), ids=lambda plot: plot.name)
@pytest.mark.filterwarnings("error")
def test_any_name_and_any_number_can_be_drawn(plot):
    assert png(plot).startswith(b"\x89PNG")
    picture = svg(plot)
    tree = ElementTree.fromstring(picture)
    assert tree.get("role") == "img"
    assert tree.get("aria-label") == plot.words
    assert tree.get("width") is None
    ids = re.findall(r'\bid="([^"]*)"', picture)
    assert len(ids) == len(set(ids))
    assert all(name.startswith(f"{plot.name}-") for name in ids)
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', picture)) <= set(ids)
    assert "#000000" not in picture


def test_names_are_drawn_as_they_are():
    text = "".join(ElementTree.fromstring(svg(odd_plots()[0])).itertext())
    assert all(name in text for name in (*ODD, "a", "b"))


def test_csv_keeps_every_digit_and_what_is_missing():
    plot = lines("l", [1, 2], {"a": [0.1 + 0.2, None], "b": [math.inf, 7]}, title="t", x="step", y="y")
    assert csv_text(plot.table) == "step,a,b\n1,0.30000000000000004,inf\n2,,7\n"
    plot = heat_map("h", ["0", "1"], ["a", "b"], [[1, 2.5], [3, None]], title="t", x="expert", y="layer")
    assert csv_text(plot.table) == "layer / expert,a,b\n0,1,2.5\n1,3,\n"


def test_words_say_what_the_picture_shows():
    plot = lines("l", [1, 5, 9], {"a": [3.0, 1.0, 2.0]}, title="t", x="step", y="y")
    assert plot.words == "1 line over step. a: 3 at step 1, 2 at step 9; lowest 1, highest 3."
    plot = heat_map("h", ["7"], ["3", "4"], [[0.5, 1.5]], title="t", x="expert", y="layer")
    assert "Lowest 0.5 at layer 7, expert 3; highest 1.5 at layer 7, expert 4." in plot.words


@pytest.mark.parametrize("colour", [*PALETTE, *SCALE])
def test_colours_stand_out_on_light_and_dark(colour):
    from moe_dist.report.style import CSS

    light, dark = re.findall(r"--card: (#[0-9a-f]{6})", CSS)
    assert contrast(colour, light) >= 3
    assert contrast(colour, dark) >= 3


def contrast(one: str, other: str) -> float:
    """WCAG 2: from 1 to 21; graphics need 3."""
    a, b = sorted((luminance(one), luminance(other)), reverse=True)
    return (a + 0.05) / (b + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
