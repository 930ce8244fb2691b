"""What a proof has found, as checks that hold or do not, and as text and JSON for people and for machines."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

NAME = "certificate.json"
WORST = 5  # tensors that are named where something is off
# A tensor's error against the plain process is at most its own rounding and that of the plain one. The sums that a
# layout takes in another order are longer at most by the number of ranks.
EASE = 4


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    within: whether every error is within what is allowed: `tolerance` (0: equal to the bit), or more for a tensor in
    `eased`: name -> (error, what rounding alone makes of it, allowed). error, where: the largest of those that are not
    eased. worst: (name, error) of the largest ones. faults: what is wrong beyond any number. compared: how many errors
    there are; errors: all of them by name.
    """

    name: str
    tolerance: float
    within: bool
    error: float = 0.0
    where: str = ""
    worst: tuple[tuple[str, float], ...] = ()
    faults: tuple[str, ...] = ()
    eased: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    compared: int = 0
    errors: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def holds(self) -> bool:
        return self.within and not self.faults

    @staticmethod
    def of(
        name: str,
        errors: dict[str, float],
        tolerance: float,
        faults: tuple[str, ...] = (),
        *,
        rounding: dict[str, float] | None = None,
    ) -> Check:
        """From the errors by name. rounding: of some tensors the error that the plain process itself has, by which more
        than the tolerance is allowed for them: EASE times as much."""
        errors = {key: math.inf if math.isnan(error) else error for key, error in errors.items()}
        allowed = {key: EASE * floor for key, floor in (rounding or {}).items() if EASE * floor > tolerance}
        eased = {
            key: (errors[key], rounding[key], most)
            for key, most in allowed.items()
            if tolerance <= errors.get(key, 0.0) < most
        }
        ranked = sorted(((key, error) for key, error in errors.items() if key not in eased), key=lambda item: -item[1])
        where, error = ranked[0] if ranked and ranked[0][1] else ("", 0.0)
        within = error < tolerance or error == tolerance == 0
        return Check(name, tolerance, within, error, where, tuple(ranked[:WORST]), faults, eased, len(errors), errors)

    def line(self, width: int) -> str:
        allowed = "to the bit" if self.tolerance == 0 else f"of {self.tolerance:.0e}"
        verdict = "holds" if self.holds else "OFF"
        return f"  {self.name:<{width}}  {verdict:<5}  {self.error:.1e} {allowed:<10}  {self.where}".rstrip()


@dataclass
class Certificate:
    """facts: what was run, by name. notes: what is not as in the config. complete: whether all checks were made."""

    facts: dict[str, object]
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    complete: bool = False

    @property
    def holds(self) -> bool:
        return self.complete and all(check.holds for check in self.checks)

    def text(self) -> str:
        width = max(map(len, [*self.facts, *(check.name for check in self.checks)]))
        lines = [f"{name:<{width + 2}}{value}" for name, value in self.facts.items()]
        lines += [f"{'note':<{width + 2}}{note}" for note in self.notes]
        lines += ["", f"  {'':<{width}}         largest error of what is allowed, and where"]
        lines += [check.line(width) for check in self.checks]
        for check in self.checks:
            for name, (error, rounding, _) in check.eased.items():
                lines.append(f"  {check.name} of {name}: {error:.1e}; the plain process itself is {rounding:.1e} off")
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
        first = next((check for check in self.checks if not check.holds), None)
        if first is None:
            return f"NOT PROVED: it ended after {len(self.checks)} checks, which hold"
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
