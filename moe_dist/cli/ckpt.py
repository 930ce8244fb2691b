"""List and verify checkpoints.

examples:
  moe-dist ckpt ls runs/tiny              every checkpoint of a run
  moe-dist ckpt verify runs/tiny          read every byte of all of them
  moe-dist ckpt verify runs/tiny/checkpoints/step-20
"""

import argparse
from pathlib import Path

from moe_dist.errors import EXIT_OK, EXIT_USER, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("ls", "verify"))
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="run folder, checkpoints folder, or one checkpoint")


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if args.action == "ls":
        return _list(root)
    from moe_dist.checkpoint import ls, verify

    single = root.name.startswith("step-")
    folders = [root] if single else [root / entry.name for entry in ls(root)]
    if not folders:
        raise UserError(f"{root}: holds no checkpoints")
    damaged = 0
    for folder in folders:
        report = verify(folder)
        damaged += not report.ok
        print(report, flush=True)
    return EXIT_USER if damaged else EXIT_OK


def _list(root: Path) -> int:
    from moe_dist.checkpoint import ls

    entries = ls(root)
    for entry in entries:
        marks = [mark for mark in ("latest", "best", "pinned") if getattr(entry, mark)]
        marks += [entry.problem] if entry.problem else []
        print(f"{entry.name:<16} {entry.bytes:>15,} bytes  {', '.join(marks)}".rstrip())
    if not entries:
        print(f"{root}: no checkpoints")
    return EXIT_OK
