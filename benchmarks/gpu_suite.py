"""Everything that a machine with a GPU has to show, in one command and under eight minutes.

    python -m benchmarks.gpu_suite [--minutes M] [--to FOLDER] [--json FILE] [--full]

The native library is built here where it lacks the CUDA kernels and nvcc is there. Then versions, `pytest tests/gpu`,
the kernels under compute-sanitizer, and the table: each data-movement kernel against a copy of as many bytes, and one
layer's experts, forward and backward, against their bare grouped products, the implementations that transformers has,
and the recipes of torchtitan and Megatron-Core in plain torch. Results are written after every step, to
FOLDER/gpu_suite.md and .json (benchmarks/results).

Without a GPU the same code runs on tiny shapes on the CPU. That says that the script works and nothing about speed; it
leaves a GPU's results alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import _gpu_checks, _gpu_kernels, _gpu_layers
from benchmarks.__main__ import replace
from benchmarks._gpu_cases import Case, cases, draw
from benchmarks._gpu_clock import Clock, Deadline, copy_time

MINUTES, MINUTES_FULL = 7.5, 60.0
COPY_BYTES = 4 << 30  # read and written in all: what the card's own copy bandwidth is taken from
HEAD = "| case | ours | peer | ratio | GB/s | peer is |\n|---|---|---|---|---|---|\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help=f"when to be done; default {MINUTES}, with --full {MINUTES_FULL}")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--full", action="store_true", help="no case is dropped, more repetitions")
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an implementation that is fetched first would wait for a network
    deadline = Deadline(60 * (options.minutes or (MINUTES_FULL if options.full else MINUTES)))
    shown = " ".join(["python -m benchmarks.gpu_suite", *(argv if argv is not None else sys.argv[1:])])
    built = {"native build": _gpu_checks.build(0.3 * deadline.left())}
    results = {"command": shown, "about": _gpu_checks.about(), "checks": built, "rows": [], "notes": []}
    on_gpu = torch.cuda.is_available()
    results["mode"] = "gpu" if on_gpu else "cpu"
    file = None if keeps_gpu_results(options.to, on_gpu) else options.to / "gpu_suite.json"
    if file is None:
        print(f"{options.to}/gpu_suite.* hold a GPU's results and stay as they are")
    for line in collect(deadline, results, torch.device("cuda" if on_gpu else "cpu")):
        print(line, flush=True)
        if file is not None:
            write(file, results)
    if options.json:
        replace(options.json, json.dumps(results["rows"], indent=1) + "\n")
    failed = [name for name, line in results["checks"].items() if "exit status" in line or "no end" in line]
    print(f"{deadline.left():.0f} s were left" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def keeps_gpu_results(folder: Path, on_gpu: bool) -> bool:
    """Whether a GPU's results lie there, which a run on a CPU must not replace."""
    file = folder / "gpu_suite.json"
    return not on_gpu and file.is_file() and json.loads(file.read_text())["mode"] == "gpu"


def collect(deadline: Deadline, results: dict, device: torch.device) -> Iterator[str]:
    """Fills `results`; yields a line after each step."""
    on_gpu = device.type == "cuda"
    yield "\n".join(f"{name}: {value}" for name, value in results["about"].items())
    results["checks"]["pytest tests/gpu"] = _gpu_checks.gpu_tests(0.35 * deadline.left())
    yield results["checks"]["pytest tests/gpu"]
    results["checks"] |= _gpu_checks.sanitizer(0.25 * deadline.left())
    yield "\n".join(f"{name}: {line}" for name, line in results["checks"].items())
    clock = Clock(device)
    bytes_moved = COPY_BYTES if on_gpu else 1 << 24
    results["copy"] = round(bytes_moved / float(copy_time(clock, bytes_moved)) / 1e6, 1)
    yield f"copy: {results['copy']} GB/s"
    # The second part gets what the first leaves, too.
    all_cases = cases(device)
    for part, share in ((kernels_of, 0.4), (layer_of, 1.0)):
        yield from measured(part, all_cases, Deadline(share * deadline.left()), results, clock)
    results["goals"] = goals(results["rows"])
    yield "\n".join(results["goals"])


def measured(part, all_cases: list[Case], deadline: Deadline, results: dict, clock: Clock) -> Iterator[str]:
    """Case after case; one that would not be done in time, by what the last one took, is left out."""
    took, cost = 0.0, 1
    for i, case in enumerate(all_cases):
        if not deadline.fits(took * max(1.0, case.cost / cost)):
            results["notes"].append(f"No time was left for {part.__name__[:-3]} at {case}.")
            yield results["notes"][-1]
            continue
        start = time.perf_counter()
        seconds = min(1.0, deadline.left() / (16 * (len(all_cases) - i)))
        try:
            for line in part(case, clock, seconds):
                if isinstance(line, dict):
                    results["rows"].append(line)
                elif line not in results["notes"]:  # what is not installed is so at every case
                    results["notes"].append(line)
                yield line if isinstance(line, str) else shown(line)
        except torch.OutOfMemoryError as error:
            results["notes"].append(f"Not enough memory for {case}: {str(error).splitlines()[0]}")
            yield results["notes"][-1]
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
        took, cost = time.perf_counter() - start, case.cost


def kernels_of(case: Case, clock: Clock, seconds: float) -> Iterator[dict | str]:
    yield from _gpu_kernels.measure(draw(case, clock.device), clock)


def layer_of(case: Case, clock: Clock, seconds: float) -> Iterator[dict | str]:
    yield from _gpu_layers.measure(draw(case, clock.device), clock, seconds)


def goals(rows: list[dict]) -> list[str]:
    """The worst case of each thing that the project promises on a GPU, beside what it promises."""
    copies = [row for row in rows if row["peer_name"] == "copy of as many bytes"]
    products = [row for row in rows if row["peer_name"] == "its bare grouped products"]
    grouped = [row for row in rows if row["peer_name"] == "transformers grouped_mm"]
    fastest = {}
    for row in rows:
        if (
            row["peer_name"].startswith("transformers ")
            and row["ratio"] < fastest.get(row["case"], row)["ratio"] + 1e-9
        ):
            fastest[row["case"]] = row
    lines = []
    for what, goal, held in (
        ("share of a copy's speed", 0.85, copies),
        ("bare grouped products over the layer, in time", 1 / 1.2, products),
        ("the fastest of transformers' implementations over ours, in time", 1.0, list(fastest.values())),
        ("transformers grouped_mm over ours, in time", 1.5, grouped),
    ):
        if held:
            worst = min(held, key=lambda row: row["ratio"])
            count = sum(row["ratio"] >= goal for row in held)
            lines.append(
                f"{what}: goal {goal:.2f}, reached in {count} of {len(held)}; lowest {worst['ratio']:.2f} "
                f"({worst['case']}; {worst['peer_name']})"
            )
    return lines


def shown(row: dict) -> str:
    """A row of the table."""
    speed = row.get("gigabytes_per_second", "")
    return (
        f"| {row['case']} | {_time(row, 'ours')} | {_time(row, 'peer')} | {row['ratio']:.2f} | {speed} "
        f"| {row['peer_name']} |"
    )


def _time(row: dict, side: str) -> str:
    spread = row.get(f"{side}_spread")
    return f"{row[side]:.4g} {row['unit']}" + (f" ({spread[0]:.4g} to {spread[1]:.4g})" if spread else "")


def write(file: Path, results: dict) -> None:
    """The figures, and the table of them."""
    lines = ["# GPU suite\n"]
    if results["mode"] == "cpu":
        lines.append(
            "**CPU mode: no GPU was visible.** Tiny shapes, to show that the script runs from end to end; the figures "
            "say nothing of a GPU.\n"
        )
    lines.append(f"`{results['command']}`\n")
    lines += [f"- {name}: {value}" for name, value in (results["about"] | results["checks"]).items()]
    if "copy" in results:
        lines.append(f"- copy of this device, bytes read and written: {results['copy']} GB/s")
    lines.append(
        "\n`ratio` is peer / ours in time: above 1 is better for us; beside a copy it is the share of its speed.\n"
        "Medians, in brackets the first and the third quartile; on a GPU with other data in the L2 cache before each.\n"
    )
    if results["mode"] == "gpu" and "goals" in results:
        lines += [*(f"- {line}" for line in results["goals"]), ""]
    lines += [HEAD + "\n".join(shown(row) for row in results["rows"]), ""]
    lines += [f"- {note}" for note in results["notes"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, json.dumps(results, indent=1) + "\n")
    replace(file.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
