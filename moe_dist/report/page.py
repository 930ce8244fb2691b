"""One HTML page of tables and figures that needs no network, no other file and no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_dist.report import drawing
from moe_dist.report.files import csv_text
from moe_dist.report.plots import Plot
from moe_dist.report.style import CSS
from moe_dist.report.tables import Table, shown

# Nothing may be fetched, whatever a name in the data may say: what is shown is in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """A heading with its figures and tables; `missing` says what is not there, and why."""

    title: str
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    missing: Sequence[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


def render(title: str, lead: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """The page. lead: one sentence under the title. notes: what the reader has to know before all else."""
    links = "".join(f'<li><a href="#{section.anchor}">{html.escape(section.title)}</a></li>' for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(lead)}</p>
{_notes(notes)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main id="content">
{"".join(map(_section, sections))}
</main>
<footer><p>Each figure and table has its numbers as a CSV file beside this page; the link below it holds the same
numbers, so that they stay with the page wherever it goes.</p></footer>
</body>
</html>
"""


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f'<section class="notes" aria-label="Notes"><p>To know first:</p><ul>{items}</ul></section>'


def _section(section: Section) -> str:
    missing = "".join(f'<p class="missing">{html.escape(text)}</p>' for text in section.missing)
    narrow = [table for table in section.tables if len(table.header) <= 2]  # has room beside a figure
    cards = "".join([*map(_figure, section.plots), *map(_table, narrow)])
    below = "".join(_table(table) for table in section.tables if table not in narrow)
    heading = f"<h2>{html.escape(section.title)}</h2>{missing}"
    return f'<section id="{section.anchor}">{heading}<div class="cards">{cards}</div>{below}</section>\n'


def _figure(plot: Plot) -> str:
    picture = drawing.svg(plot)
    if plot.wide:
        picture = _scrolling(picture, plot.title)
    return (
        f'<figure class="card{" wide" if plot.wide else ""}" id="figure-{plot.name}"><h3>{html.escape(plot.title)}</h3>'
        f"{picture}<figcaption>{html.escape(plot.meaning)} {_download(plot.name, plot.table)}</figcaption>"
        "</figure>\n"
    )


def _table(table: Table) -> str:
    kinds = [' class="number"' if numeric else "" for numeric in [False, *table.numeric[1:]]]
    head = "".join(
        f'<th scope="col"{kind}>{html.escape(name)}</th>' for name, kind in zip(table.header, kinds, strict=True)
    )
    rows = "".join(f"<tr>{_row(row, kinds)}</tr>\n" for row in table.rows)
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>"
    return (
        f'<div class="card table" id="table-{table.name}"><h3>{html.escape(table.title)}</h3>'
        f"{_scrolling(whole, table.title)}"
        f"<p>{html.escape(table.meaning)} {_download(table.name, [table.header, *table.rows])}</p></div>\n"
    )


def _scrolling(content: str, title: str) -> str:
    """What is wider than the screen scrolls within its own frame, which the keyboard can reach."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(title)}">{content}</div>'


def _row(row: Sequence, kinds: Sequence[str]) -> str:
    first, *rest = (html.escape(shown(value)) for value in row)
    cells = "".join(f"<td{kind}>{value}</td>" for value, kind in zip(rest, kinds[1:], strict=True))
    return f'<th scope="row">{first}</th>{cells}'


def _download(name: str, table: Sequence[Sequence]) -> str:
    data = base64.b64encode(csv_text(table).encode()).decode()
    return f'<a class="numbers" download="{name}.csv" href="data:text/csv;base64,{data}">Numbers: {name}.csv</a>'
