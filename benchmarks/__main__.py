"""Run the benchmarks one after the other, each in a process of its own, and write one table of all results.

    python -m benchmarks [NAME ...] [--full] [--to FOLDER]      (make bench ONLY="NAME ...")

The table goes to benchmarks/results/summary.md, its figures to summary.json, after every benchmark. Where only some are
named, the others' earlier results stay; each carries the device, the versions and the day of its own run. A benchmark
that fails does not stop the others; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks._summary import ROW, render

HERE = Path(__file__).parent
LIMIT = 900.0  # seconds without --full: three times what a benchmark may take, so that one that hangs ends
PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "peft")


def main(argv: list[str] | None = None, *, folder: Path = HERE) -> int:
    there = names(folder)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(there)}; all of them by default")
    parser.add_argument("--full", action="store_true", help="each with --full: hours")
    parser.add_argument("--to", type=Path, default=HERE / "results", metavar="FOLDER", help="where the table goes")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.names) - set(there)):
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(there)}")
    options.to.mkdir(parents=True, exist_ok=True)
    file = options.to / "summary.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    results = {name: result for name, result in results.items() if name in there}
    failed = []
    for name in options.names or there:
        results[name] = measure(f"{folder.name}.{name}", full=options.full, root=folder.parent)
        if results[name]["exit_status"] != 0:
            failed.append(name)
        replace(file, json.dumps(results, indent=1, sort_keys=True) + "\n")
        replace(file.with_suffix(".md"), render(results))
    print(f"the table is {file.with_suffix('.md')}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def names(folder: Path) -> list[str]:
    """The benchmarks of a folder; modules that begin with _ serve them."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def measure(module: str, *, full: bool, root: Path, limit: float = LIMIT) -> dict:
    """One benchmark's rows, and how they came about. exit_status: its own, or why there is none, in words."""
    options = ["--full"] if full else []
    print(f"\n=== python -m {' '.join([module, *options])}", flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        file = Path(scratch) / "rows.json"
        command = [sys.executable, "-m", module, "--json", str(file), *options]
        process = subprocess.Popen(command, cwd=root, start_new_session=True)
        try:
            status: int | str = process.wait(None if full else limit)
        except subprocess.TimeoutExpired:
            status = f"no end after {limit:.3g} s"
        finally:
            if process.returncode is None:  # with the ranks that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.perf_counter() - start
        rows = json.loads(file.read_text()) if file.is_file() and isinstance(status, int) else []
    if any(key not in row for row in rows for key in ROW):
        rows, status = [], f"a row lacks one of {', '.join(ROW)}"
    return {
        "about": about(root / (module.replace(".", "/") + ".py")),
        "command": " ".join(["python", "-m", module, *options]),
        "day": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": device(),
        "versions": versions(),
        "seconds": round(seconds, 1),
        "exit_status": status,
        "rows": rows,
    }


def about(file: Path) -> str:
    """The first line of a module's description."""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def device() -> str:
    from benchmarks._harness import hardware

    return f"{hardware()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def replace(file: Path, text: str) -> None:
    """Write all of it or nothing."""
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    os.replace(part, file)


if __name__ == "__main__":
    sys.exit(main())
