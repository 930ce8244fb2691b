"""What the benchmarks share: paired timing, rows of results, the table and the file they go to.

A row has `case`, `unit`, `ours`, `peer`, `peer_name` and `ratio` = peer / ours: above 1 is better for us. A row of
times has `ours_spread` and `peer_spread` too: the first and the third quartile over repetitions.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch


class Median(float):
    """The median of repeated measurements; `spread` is their first and third quartile."""

    spread: tuple[float, float]

    def __new__(cls, values: Sequence[float]):
        median = super().__new__(cls, statistics.median(values))
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [median]
        median.spread = float(lower), float(upper)
        return median


class Missed(Exception):
    """What a benchmark raises, after its rows, where a claim of it does not hold: the exit status becomes 1."""


def interleaved(functions: Sequence[Callable[[], object]], *, rounds: int = 15, seconds: float = 2.0) -> list[Median]:
    """Median milliseconds of each function. They take turns, so that a busy machine is busy for all of them alike.

    Stops after `rounds` turns, or after `seconds` once there were three.
    """
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:  # first calls fault pages in and start threads
        function()
    start = time.perf_counter()
    for turn in range(rounds):
        order = range(len(functions))
        for i in order if turn % 2 == 0 else reversed(order):
            begin = time.perf_counter()
            functions[i]()
            times[i].append(1e3 * (time.perf_counter() - begin))
        if turn >= 2 and time.perf_counter() - start > seconds:
            break
    return [Median(values) for values in times]


def row(case: str, ours: float, peer: float, peer_name: str, unit: str = "ms") -> dict:
    """One line of results; the figures as they go into the file. A `Median` brings its spread along."""
    line = {
        "case": case,
        "unit": unit,
        "ours": round(float(ours), 4),
        "peer": round(float(peer), 4),
        "peer_name": peer_name,
        "ratio": round(peer / ours, 3),
    }
    for side, figure in (("ours", ours), ("peer", peer)):
        if isinstance(figure, Median):
            line[f"{side}_spread"] = [round(end, 4) for end in figure.spread]
    return line


def run(
    name: str,
    collect: Callable[[bool], Iterable[dict | str]],
    *,
    description: str,
    arguments: Sequence[str] | None = None,
) -> None:
    """Command line of a benchmark: `collect(full)` yields rows, which are printed as they come and written at the end.

    What is printed is Markdown: it goes into benchmarks/results/ as it stands. A string among the rows is a note, which
    is printed below the table. `Missed` ends the rows and makes the exit status 1.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--full", action="store_true", help="more cases and more rounds than fit into five minutes")
    options = parser.parse_args(arguments)
    shown = " ".join(["python -m", f"benchmarks.{name}", *(arguments if arguments is not None else sys.argv[1:])])
    print(f"`{shown}` on {device()}\n")
    print("| case | unit | ours | peer | ratio | peer is |\n|---|---|---|---|---|---|")
    rows, notes, missed = [], [], None
    try:
        for line in collect(options.full):
            if isinstance(line, str):
                notes.append(line)
                continue
            rows.append(line)
            figures = f"{line['ours']:.4g} | {line['peer']:.4g} | {line['ratio']:.2f}"
            print(f"| {line['case']} | {line['unit']} | {figures} | {line['peer_name']} |", flush=True)
    except Missed as claim:
        missed = f"missed: {claim}"
        notes.append(missed)
    for note in notes:
        print(f"\n{note}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if missed:
        sys.exit(1)


def device() -> str:
    """Processor or GPU, threads and versions, in a line."""
    threads = "" if torch.cuda.is_available() else f", {torch.get_num_threads()} threads"
    return f"{hardware()}{threads}; torch {torch.__version__}, Python {platform.python_version()}"


def hardware() -> str:
    """Name of the GPU, else of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
