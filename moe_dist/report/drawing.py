"""Plots as pictures: PNG for slides, SVG to stand inside a page. Needs matplotlib, and no display."""

from __future__ import annotations

import html
import io
import re
import warnings

from moe_dist.errors import UserError
from moe_dist.report.plots import Plot

# Inches. At this width text of 10 points is readable on a phone and not yet loud on a desk.
NARROW, WIDE, HEIGHT = 4.8, 7.6, 3.1
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with two dollar signs in it is a name
}


def require() -> None:
    """Raise UserError with the command to type where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("plots need matplotlib; install it with `pip install 'moe_dist[plots]'`") from None


def png(plot: Plot) -> bytes:
    """The plot with its title, on white."""
    return _draw(plot, "png", title=True, dpi=150, metadata={"Software": None})


def svg(plot: Plot) -> str:
    """The plot as an `<svg>` element for a page: no title, no background, the page's colour of text for black.

    Its ids are unlike those of other plots of the page.
    """
    text = _draw(plot, "svg", title=False, dpi=150, transparent=True, metadata={"Date": None, "Creator": None}).decode()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace("#000000", "currentColor")
    text = re.sub(r'(\bid="|\burl\(#|\bhref="#)', lambda match: f"{match[1]}{plot.name}-", text)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    # The page scales it: a width in points would not shrink with the screen.
    text = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text))
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(plot.words)}"', 1)


def _draw(plot: Plot, kind: str, *, title: bool, **how) -> bytes:
    require()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The salt makes the ids inside an SVG the same every time: the same run gives the same page.
    with rc_context({**STYLE, "svg.hashsalt": plot.name}):
        figure = Figure(figsize=(WIDE if plot.wide else NARROW, HEIGHT), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        plot.paint(axes)
        axes.set(xlabel=plot.x, ylabel=plot.y)
        if title:
            axes.set_title(plot.title, wrap=True)
        file = io.BytesIO()
        with warnings.catch_warnings():
            # Its own font lacks some scripts. A browser takes another one for the text of an SVG.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(file, format=kind, **how)
    return file.getvalue()
