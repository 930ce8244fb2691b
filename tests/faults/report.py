"""Brings about every fault of the list and prints what held: `python -m tests.faults.report [NN ...] [--minutes M]`.

Exits 0 only when every item that can be tested on this machine held. An item without a test, or one that the time did
not suffice for, has not held.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.conftest import RESULTS
from tests.faults.items import ITEMS

MINUTES = 25  # for all of them, on two cores that have nothing else to do


@dataclass
class Result:
    """What the tests of one item came to."""

    passed: int = 0
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.failed:
            return "NOT HELD"
        if self.passed:
            return "held"
        return "skipped" if self.skipped else "NO TEST RAN"

    @property
    def good(self) -> bool:
        return self.verdict in ("held", "skipped")


def run(numbers: list[int], *, minutes: float) -> tuple[dict[int, Result], bool]:
    """(result by item, whether the time sufficed)."""
    chosen = ["-k", " or ".join(f"test_fault_{number:02d}_" for number in numbers)] if numbers else []
    command = [sys.executable, "-m", "pytest", "-q", "--faults", "--tb=short", "--continue-on-collection-errors"]
    command += [*chosen, str(Path(__file__).parent)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.jsonl"
        process = subprocess.Popen(command, env={**os.environ, RESULTS: str(file)}, stdout=sys.stderr)
        try:
            process.wait(timeout=minutes * 60)
            in_time = True
        except subprocess.TimeoutExpired:
            in_time = False
            process.terminate()
            process.wait()
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return gather(lines, numbers or list(ITEMS)), in_time


def gather(lines: list[dict], numbers: list[int]) -> dict[int, Result]:
    results = {number: Result() for number in numbers}
    for line in lines:
        result = results[line["item"]]
        result.seconds += line["seconds"]
        if line["outcome"] == "failed":
            result.failed.append(line["test"])
        elif line["outcome"] == "skipped":
            result.skipped.append(line["reason"].removeprefix("Skipped: "))
        elif line["phase"] == "call":
            result.passed += 1
    return results


def table(results: dict[int, Result]) -> str:
    lines = []
    for number, result in results.items():
        lines.append(f"{number:>2}  {result.verdict:<11} {result.passed:>3} {result.seconds:>7.1f} s  {ITEMS[number]}")
        lines += [f"{'':>30}failed: {test}" for test in dict.fromkeys(result.failed)]
        lines += [f"{'':>30}skipped: {reason}" for reason in dict.fromkeys(result.skipped)]
    verdicts = [result.verdict for result in results.values()]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    return "\n".join(["item verdict  tests    time", *lines, f"{len(results)} items: {counts}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="NN", help="these items only")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"give up after so many ({MINUTES})")
    args = parser.parse_args()
    if unknown := sorted(set(args.numbers) - set(ITEMS)):
        parser.error(f"no items of the list: {unknown}")
    started = time.monotonic()
    results, in_time = run(args.numbers, minutes=args.minutes)
    print(table(results))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes" + ("" if in_time else ": the time did not suffice"))
    return 0 if in_time and all(result.good for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
