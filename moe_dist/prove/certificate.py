"""What a proof has found, as checks that hold or do not, and as text and JSON for people and for machines."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

NAME = "certificate.json"
WORST = 5  # tensors that are named where something is off


@dataclass(frozen=True)
class Check:
    """One thing that was compared. error: the largest; tolerance: the largest allowed (0: equal to the bit). where: of
    the largest error. worst: (name, error) of the largest ones. faults: what is wrong beyond any number. compared: how
    many errors there are; errors: all of them by name."""

    name: str
    error: float
    tolerance: float
    where: str = ""
    worst: tuple[tuple[str, float], ...] = ()
    faults: tuple[str, ...] = ()
    compared: int = 0
    errors: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def holds(self) -> bool:
        within = self.error <= self.tolerance if self.tolerance == 0 else self.error < self.tolerance
        return within and not self.faults

    @staticmethod
    def of(name: str, errors: dict[str, float], tolerance: float, faults: tuple[str, ...] = ()) -> Check:
        """From the errors by name."""
        errors = {key: math.inf if math.isnan(error) else error for key, error in errors.items()}
        ranked = sorted(errors.items(), key=lambda item: -item[1])[:WORST]
        where, error = ranked[0] if ranked else ("", 0.0)
        return Check(name, error, tolerance, where, tuple(ranked), faults, len(errors), errors)

    def line(self, width: int) -> str:
        allowed = "to the bit" if self.tolerance == 0 else f"of {self.tolerance:.0e}"
        verdict = "holds" if self.holds else "OFF"
        return f"  {self.name:<{width}}  {verdict:<5}  {self.error:.1e} {allowed:<10}  {self.where}".rstrip()


@dataclass
class Certificate:
    """facts: what was run, by name. notes: what is not as in the config."""

    facts: dict[str, object]
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return bool(self.checks) and all(check.holds for check in self.checks)

    def text(self) -> str:
        width = max(map(len, [*self.facts, *(check.name for check in self.checks)]))
        lines = [f"{name:<{width + 2}}{value}" for name, value in self.facts.items()]
        lines += [f"{'note':<{width + 2}}{note}" for note in self.notes]
        lines += ["", f"  {'':<{width}}         largest error of what is allowed, and where"]
        lines += [check.line(width) for check in self.checks]
        for check in self.checks:
            if not check.holds:
                lines += ["", f"{check.name}: the worst of {check.compared}"]
                lines += [f"  {error:.2e}  {name}" for name, error in check.worst]
                lines += [f"  {fault}" for fault in check.faults[:WORST]]
                if len(check.faults) > WORST:
                    lines.append(f"  and {len(check.faults) - WORST} more")
        return "\n".join([*lines, "", self.verdict()])

    def verdict(self) -> str:
        """One line: that all holds, or what is off first, and where."""
        if self.holds:
            return "PROVED: this layout trains as one plain process does"
        first = next(check for check in self.checks if not check.holds)
        where = first.where if not first.faults else first.faults[0]
        return f"NOT PROVED: {first.name} off, worst at {where}"

    def write(self, folder: Path) -> Path:
        """As `certificate.json` in `folder`. Numbers that are not finite are written as text."""
        tree = {
            "holds": self.holds,
            "verdict": self.verdict(),
            **self.facts,
            "notes": self.notes,
            "checks": [self._short(check) for check in self.checks],
            **{name: self._errors(name) for name in ("gradients", "weights")},
        }
        path = folder / NAME
        path.write_text(json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path

    def _errors(self, name: str) -> dict[str, float]:
        """Of every tensor of a check."""
        return next((check.errors for check in self.checks if check.name == name), {})

    @staticmethod
    def _short(check: Check) -> dict[str, object]:
        fields = {name: value for name, value in asdict(check).items() if name != "errors"}
        return {**fields, "holds": check.holds}


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
