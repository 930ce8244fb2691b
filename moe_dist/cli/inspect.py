"""Look at a run: tables, plots, and one page that shows them all.

Reads a run folder, whether its run has finished, is at work, was resumed, or was killed. Prints its tables, and writes
to RUN/plots every table as CSV, every figure as PNG with its numbers as CSV, and index.html: one file that needs no
network and no other file, for a browser on a desk or a phone.

  loss            training, and each held-out domain
  routing         heat map of layer by expert, its change, what each held-out domain sends to each expert over time,
                  load of experts and ranks, evenness, drops
  optimizer       learning rate, gradient norm, speed
  experts         which of them train, coverage curves, and what tasks have in common

The numbers come from RUN/metrics.jsonl; coverage and overlap from RUN/summary.json if `moe-dist esft score` wrote one
there, else from the routing that the run has counted. It needs matplotlib: pip install 'moe_dist[plots]'.

examples:
  moe-dist inspect runs/tiny
  moe-dist inspect runs/tiny --out /tmp/page
  moe-dist inspect runs/law --compare intent/summary.json summary-task/summary.json
"""

import argparse
from pathlib import Path

from moe_dist.errors import EXIT_OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="DIR", help="where to write; RUN/plots when absent")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="FILE", help="summary.json of other tasks, for their overlap"
    )


def run(args: argparse.Namespace) -> int:
    from moe_dist.checkpoint import ls
    from moe_dist.methods.esft import run_report
    from moe_dist.report import drawing
    from moe_dist.report.files import write_files
    from moe_dist.report.record import read_run
    from moe_dist.report.run_page import checkpoint_table, run_files, sections

    drawing.require()
    record = read_run(args.run)
    folder = record.folder / "checkpoints"
    checkpoints = checkpoint_table(ls(folder) if folder.is_dir() else [])
    parts = sections(record, experts=run_report.section(record, compare=args.compare), checkpoints=checkpoints)
    out = Path(args.out) if args.out is not None else record.folder / "plots"
    written = write_files(out, run_files(record, parts))
    for note in record.notes:
        print(f"note: {note}")
    for part in parts:
        for text in [*part.missing, *(table.text() for table in part.tables)]:
            print(f"\n{text}")
    print(f"\nwrote {len(written)} files to {out}; open {out / 'index.html'}")
    return EXIT_OK
