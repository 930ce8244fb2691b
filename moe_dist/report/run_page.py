"""The page of a run, put together: its sections, in the order in which a reader asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moe_dist.report import page, tables
from moe_dist.report.curves import curve_plots
from moe_dist.report.domain_routing import domain_plots
from moe_dist.report.files import csv_text, plot_files
from moe_dist.report.page import Section
from moe_dist.report.record import RunRecord
from moe_dist.report.routing import routing_plots
from moe_dist.report.tables import Table

PAGE = "index.html"
RUN_TABLES = ("summary", "held_out")  # of what the run learned; the others are about how
OPTIMIZER = ("learning_rate", "gradient_norm", "speed")


class Checkpoint(Protocol):
    """A line of `moe_dist.checkpoint.ls`."""

    name: str
    bytes: int
    latest: bool
    best: bool
    pinned: bool
    problem: str | None


def checkpoint_table(entries: Sequence[Checkpoint]) -> Table:
    rows = []
    for entry in entries:
        marks = [mark for mark in ("latest", "best", "pinned") if getattr(entry, mark)]
        rows.append((entry.name, entry.bytes, ", ".join([*marks, *([entry.problem] if entry.problem else [])])))
    return Table("checkpoints", "Checkpoints", ("name", "bytes", "remarks"), rows)


def sections(record: RunRecord, *, experts: Section, checkpoints: Table) -> list[Section]:
    """All sections of the page. experts: what the method has to say of its experts."""
    curves = {plot.name: plot for plot in curve_plots(record)}
    routing = routing_plots(record)
    named = {table.name: table for table in tables.run_tables(record)}
    loss = [curves.pop(name) for name in ("loss",) if name in curves]
    optimizer = [curves.pop(name) for name in OPTIMIZER if name in curves]
    about_routing = [named.pop(name) for name in ("layers",) if name in named]
    first = [named.pop(name) for name in RUN_TABLES if name in named]
    rest = [*named.values(), *([checkpoints] if checkpoints.rows else [])]
    missing = "No line of training has been written yet."
    return [
        Section("Overview", loss, first, _unless(loss, missing) + _no_held_out(record)),
        Section(
            "Routing",
            [*routing, *domain_plots(record), *curves.values()],
            about_routing,
            _unless(routing, _no_routing(record)),
        ),
        experts,
        Section("Optimizer", optimizer, (), _unless(optimizer, missing)),
        Section("Data and files", (), rest, _unless(checkpoints.rows, "There is no checkpoint.")),
    ]


def run_files(record: RunRecord, parts: Sequence[Section]) -> dict[str, bytes]:
    """{file name: content}: every table and plot, and the page last, since it speaks of the others."""
    files: dict[str, bytes] = {}
    for part in parts:
        for table in part.tables:
            files[f"{table.name}.csv"] = csv_text([table.header, *table.rows]).encode()
        for plot in part.plots:
            files |= plot_files(plot)
    files[PAGE] = page.render(record.name, tables.state(record), record.notes, parts).encode()
    return files


def _unless(there: object, words: str) -> list[str]:
    return [] if there else [words]


def _no_held_out(record: RunRecord) -> list[str]:
    if record.domains:
        return []
    asked = record.setting("data", "eval") or record.setting("data", "eval_fraction")
    return (
        ["No held-out loss yet: it is measured at the end, and every train.eval_every steps."]
        if asked
        else ["No held-out loss: the run has no data.eval."]
    )


def _no_routing(record: RunRecord) -> str:
    if record.events.get("train"):
        return (
            "No heat map: metrics.jsonl has no line of what each expert got. A run writes 20 of them in all; "
            "one that ended early, or was made by an older version, has none."
        )
    return "No heat map: nothing has been counted yet."
