"""The command line and the folder of finished trainings that the experiments on quality have in common."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from moe_dist.config.strict_json import write_json


def parser_of(name: str, description: str, *, work: Path, duration: str) -> argparse.ArgumentParser:
    """The options of `python -m benchmarks.NAME`. duration: how long all trainings take, in words."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--work", type=Path, default=work, metavar="FOLDER", help=f"finished trainings ({work})")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long trainings may run (5)")
    parser.add_argument("--full", action="store_true", help=f"all trainings in one go: {duration} on one core")
    parser.add_argument("--smoke", action="store_true", help="everything in seconds, on models that learn nothing")
    return parser


def folder_of(work: Path, identity: dict) -> Path:
    """The folder of trainings with these settings, texts and versions: others must not be taken for them."""
    folder = work / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder.mkdir(exist_ok=True)
    write_json(folder / "identity.json", identity)
    return folder
