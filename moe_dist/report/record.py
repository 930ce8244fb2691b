"""What a run folder says about its run, read so that an unfinished, resumed, killed or empty run can be looked at."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.config.load import read_mapping
from moe_dist.config.strict_json import read_json
from moe_dist.errors import UserError

CONFIG, ENVIRONMENT, METRICS = "config.resolved.yaml", "env.json", "metrics.jsonl"


@dataclass
class RunRecord:
    """events: lines of metrics.jsonl by kind, each kind in the order of the file. notes: what is missing or damaged.

    Of the lines of training only the last keeps its figures of single layers.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    events: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.setting("run", "name") or self.folder.absolute().name)

    def setting(self, *keys: str) -> Any:
        """A value of the configuration, None where it is not there."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def series(self, event: str, *keys: str) -> dict[int, float]:
        """{step: number} of a value of these events; where a step stands twice, the later line counts."""
        found = {entry["step"]: number(_at(entry, keys)) for entry in self.events.get(event, [])}
        return {step: value for step, value in sorted(found.items()) if value is not None}

    def last(self, event: str) -> dict[str, Any]:
        """The last line of that kind, {} if there is none."""
        return self.events[event][-1] if self.events.get(event) else {}

    @property
    def domains(self) -> list[str]:
        """Held-out domains, in the order in which they first appear."""
        return list(dict.fromkeys(name for entry in self.events.get("eval", []) for name in _mapping(entry, "domains")))

    @property
    def last_step(self) -> int:
        return max((entry["step"] for lines in self.events.values() for entry in lines), default=0)

    @property
    def last_time(self) -> float | None:
        """Seconds since 1970 of the last line."""
        return max((number(e.get("time")) or 0.0 for lines in self.events.values() for e in lines), default=None)


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder. UserError where it is none; whatever else is missing or damaged becomes a note."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not any((folder / name).is_file() for name in (CONFIG, METRICS)):
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; did you mean {', '.join(str(folder / name) for name in inside)}?" if inside else ""
        raise UserError(f"{folder}: is no run folder (there is no {CONFIG} in it){hint}")
    record = RunRecord(folder)
    for name, read, value in ((CONFIG, read_mapping, record.config), (ENVIRONMENT, read_json, record.environment)):
        if not (folder / name).is_file():
            record.notes.append(f"{name} is missing")
            continue
        try:
            value.update(read(folder / name))
        except UserError as error:
            record.notes.append(f"not used: {error}")
    if (folder / METRICS).is_file():
        _read_metrics(record)
    else:
        record.notes.append(f"{METRICS} is missing: the run has ended before its first step")
    return record


def _read_metrics(record: RunRecord) -> None:
    unread = []
    try:
        with open(record.folder / METRICS, encoding="utf-8", errors="replace") as file:
            for place, line in enumerate(file, 1):
                if not _take(record, line):
                    unread.append(place)
    except OSError as error:
        record.notes.append(f"{METRICS} cannot be read to its end: {error.strerror}")
    if unread:
        places = ", ".join(map(str, unread[:5])) + (", ..." if len(unread) > 5 else "")
        record.notes.append(
            f"{METRICS}: {len(unread)} of its lines cannot be read and are left out (line {places}); "
            "a run that was killed leaves a torn last line"
        )
    if not record.events.get("train"):
        record.notes.append(f"{METRICS} has no line of training: nothing is known yet of loss and load")
    odd = [
        entry["step"]
        for entry in record.events.get("train", [])
        if (loss := number(entry.get("loss"))) is not None and not math.isfinite(loss)
    ]
    if odd:
        record.notes.append(f"the training loss is not a finite number in {len(odd)} line(s), first at step {odd[0]}")


def _take(record: RunRecord, line: str) -> bool:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return not line.strip()
    if not isinstance(entry, dict) or not isinstance(entry.get("event"), str) or type(entry.get("step")) is not int:
        return False
    lines = record.events[entry["event"]]
    if entry["event"] == "train" and lines:
        lines[-1].pop("layers", None)  # tens of layers in each of thousands of lines, of which the last is shown
    lines.append(entry)
    return True


def number(value: Any) -> float | int | None:
    """A number as metrics.jsonl has it, those that are not finite as text; None for anything else."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isinstance(value, float) or abs(value) < 2**63 else None


def numbers(values: Any) -> list[float | int]:
    """A list of numbers; empty where it is anything else."""
    found = [number(value) for value in values] if isinstance(values, list) else []
    return [] if None in found else found


def by_layer(names: Iterable[str]) -> list[str]:
    """Names of layers in order of depth, what is no number at the end."""
    return sorted(names, key=lambda name: (not name.isdecimal(), len(name) if name.isdecimal() else 0, name))


def _at(entry: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = entry
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _mapping(entry: dict[str, Any], key: str) -> dict[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, dict) else {}
