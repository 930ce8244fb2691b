"""Tables of a run: as text, as CSV, and as the rows that the page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median
from typing import Any

from moe_dist.report.record import RunRecord, by_layer, number


@dataclass(frozen=True)
class Table:
    """name: stem of its file. header and rows: as the CSV has them. meaning: how to read it."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    meaning: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers alone (or nothing), and stand to the right."""
        columns = [[row[c] for row in self.rows if row[c] is not None] for c in range(len(self.header))]
        return [all(number(value) is not None for value in column) for column in columns]

    def text(self) -> str:
        """For a terminal: numbers to the right, words to the left."""
        cells = [self.header, *(tuple(map(shown, row)) for row in self.rows)]
        widths = [max(len(row[c]) for row in cells) for c in range(len(self.header))]
        lines = [
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, self.numeric, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self.title, *(f"  {line}" for line in lines)])


def shown(value: Any) -> str:
    """A value for people: 12,345 and 0.01235, and a dash for what is not there."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def run_tables(record: RunRecord) -> list[Table]:
    """Those tables for which the run has numbers."""
    tables = [summary(record), held_out(record), layers(record), trainable(record), data(record), skipped(record)]
    return [table for table in tables if table.rows]


def state(record: RunRecord) -> str:
    """How far the run is, in a sentence. A folder cannot tell a run that is at work from one that was killed."""
    steps, step = number(record.setting("train", "steps")), record.last_step
    if not record.events.get("train"):
        return "No step has been logged yet."
    if steps is None:
        return f"The last line is of step {step:,}."
    if step >= steps:
        return f"Finished: {step:,} of {steps:,} steps."
    end = number(record.setting("train", "stop_at"))
    if end is not None and step >= end:
        return f"Ended at step {step:,} as train.stop_at says, of {steps:,} in the schedule."
    return f"Not finished: {step:,} of {steps:,} steps. The run was stopped, was killed, or is still at work."


def summary(record: RunRecord) -> Table:
    model = record.setting("model", "path") or record.setting("model", "config", "model_type")
    starts = [entry["step"] for entry in record.events.get("data", [])]
    loss = record.series("train", "loss")
    rows: list[tuple[str, Any]] = [
        ("state", state(record)),
        ("model", model),
        ("ranks of the last start", number(record.environment.get("world_size"))),
        ("expert-parallel ranks", number(record.setting("parallel", "expert"))),
        ("ZeRO stage", number(record.setting("parallel", "zero_stage"))),
        ("precision", record.setting("train", "precision")),
        ("starts", _starts(starts)),
        ("tokens trained on", _last(record.series("train", "tokens"))),
        ("training loss, first logged", _first(loss)),
        ("training loss, last logged", _last(loss)),
        ("steps skipped", len(record.events.get("skipped", [])) if loss else None),
        ("tokens a second, median", _median(record)),
        ("last line of metrics.jsonl", _when(record.last_time)),
    ]
    return Table("summary", "The run", ("what", "value"), [row for row in rows if row[1] is not None])


def held_out(record: RunRecord) -> Table:
    rows = []
    for name in record.domains:
        loss = record.series("eval", "domains", name, "loss")
        if loss:
            best = min(loss, key=lambda step: (loss[step] != loss[step], loss[step]))
            perplexity = record.series("eval", "domains", name, "perplexity")
            tokens = record.series("eval", "domains", name, "tokens")
            figures = (_first(loss), loss[best], best, _last(loss), _last(perplexity), _last(tokens))
            rows.append((name, *figures))
    header = ("domain", "first loss", "lowest loss", "at step", "last loss", "last perplexity", "label tokens")
    return Table("held_out", "Held-out loss by domain", header, rows, "Nats a label token; perplexity is its exponent.")


def layers(record: RunRecord) -> Table:
    line = record.last("train")
    figures = line.get("layers") if isinstance(line.get("layers"), dict) else {}
    keys = ("load_max", "load_entropy", "dead", "dropped")
    rows = [
        (layer, *(number(figures[layer].get(key)) for key in keys))
        for layer in by_layer(figures)
        if isinstance(figures[layer], dict)
    ]
    return Table(
        "layers",
        "Routing by layer",
        ("layer", "busiest expert over mean", "evenness", "experts without a token", "share dropped"),
        rows,
        f"Of the last logged step ({line.get('step')}) alone. Evenness: entropy of the experts' shares over log E.",
    )


def trainable(record: RunRecord) -> Table:
    found = record.last("trainable").get("layers")
    keys = ("experts_trained", "experts", "expert_trained", "expert", "dense_trained", "dense", "optimizer_bytes")
    rows = [
        (layer, *(number(found[layer].get(key)) for key in keys))
        for layer in (by_layer(found) if isinstance(found, dict) else [])
        if isinstance(found[layer], dict)
    ]
    if rows:
        rows.append(("all", *(sum(row[c] or 0 for row in rows) for c in range(1, len(keys) + 1))))
    return Table(
        "trainable",
        "What trains",
        (
            "layer",
            "experts that train",
            "of experts",
            "expert parameters that train",
            "of expert parameters",
            "other parameters that train",
            "of other parameters",
            "optimizer bytes",
        ),
        rows,
        "Experts are counted over all ranks; parameters and bytes of optimizer state are those of rank 0.",
    )


def data(record: RunRecord) -> Table:
    line, rows = record.last("data"), []
    for part in ("train", "eval"):
        for name, source in (line.get(part) or {}).items() if isinstance(line.get(part), dict) else ():
            if isinstance(source, dict):
                rows.append((part, name, *(number(source.get(key)) for key in ("documents", "tokens", "rows"))))
    return Table("data", "Data", ("part", "source", "documents", "tokens", "rows"), rows)


def skipped(record: RunRecord) -> Table:
    rows = [(entry["step"], str(entry.get("grad_norm"))) for entry in record.events.get("skipped", [])]
    return Table(
        "skipped",
        "Skipped steps",
        ("step", "gradient norm"),
        rows,
        "Steps that no rank took, because a loss or a gradient was not finite.",
    )


def _starts(steps: Sequence[int]) -> str | None:
    if not steps:
        return None
    resumed = [f"{step:,}" for step in steps if step]
    return f"{len(steps)}" + (f"; went on from step {', '.join(resumed)}" if resumed else "")


def _first(series: dict[int, float]) -> float | None:
    return next(iter(series.values()), None)


def _last(series: dict[int, float]) -> float | None:
    return next(reversed(series.values()), None)


def _median(record: RunRecord) -> float | None:
    speed = record.series("train", "tokens_per_second")
    return median(speed.values()) if speed else None


def _when(seconds: float | None) -> str | None:
    if not seconds:
        return None
    try:
        return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return None
