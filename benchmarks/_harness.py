"""What the benchmarks share: paired timing, rows of results, the table and the file they go to.

A row has `case`, `unit`, `ours`, `peer`, `peer_name` and `ratio` = peer / ours: above 1 is better for us.
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


def interleaved(functions: Sequence[Callable[[], object]], *, rounds: int = 15, seconds: float = 2.0) -> list[float]:
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
    return [statistics.median(values) for values in times]


def row(case: str, ours: float, peer: float, peer_name: str, unit: str = "ms") -> dict:
    """One line of results; the figures as they go into the file."""
    return {
        "case": case,
        "unit": unit,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "peer_name": peer_name,
        "ratio": round(peer / ours, 3),
    }


def run(
    name: str,
    collect: Callable[[bool], Iterable[dict | str]],
    *,
    description: str,
    arguments: Sequence[str] | None = None,
) -> None:
    """Command line of a benchmark: `collect(full)` yields rows, which are printed as they come and written at the end.

    What is printed is Markdown: it goes into benchmarks/results/ as it stands. A string among the rows is a note, which
    is printed below the table.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--full", action="store_true", help="more cases and more rounds than fit into five minutes")
    options = parser.parse_args(arguments)
    shown = " ".join(["python -m", f"benchmarks.{name}", *(arguments if arguments is not None else sys.argv[1:])])
    print(f"`{shown}` on {device()}\n")
    print("| case | unit | ours | peer | ratio | peer is |\n|---|---|---|---|---|---|")
    rows, notes = [], []
    for line in collect(options.full):
        if isinstance(line, str):
            notes.append(line)
            continue
        rows.append(line)
        figures = f"{line['ours']:.4g} | {line['peer']:.4g} | {line['ratio']:.2f}"
        print(f"| {line['case']} | {line['unit']} | {figures} | {line['peer_name']} |", flush=True)
    for note in notes:
        print(f"\n{note}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def device() -> str:
    """Processor or GPU, threads and versions, in a line."""
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{hardware}; torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
