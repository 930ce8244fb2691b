"""The run folder: what a run writes, and whether a command may write there.

    config.resolved.yaml   the configuration, secrets redacted
    env.json               versions, host, ranks
    metrics.jsonl          one line an event, always
    checkpoints/           step-N/ and latest
    export/                the Hugging Face folder, once exported

The same command again resumes. A folder of another run is never written into silently.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
from importlib import metadata
from pathlib import Path

from moe_dist.config import save
from moe_dist.config.load import read_mapping
from moe_dist.config.schema import RunConfig
from moe_dist.errors import UserError

CONFIG, METRICS, CHECKPOINTS = "config.resolved.yaml", "metrics.jsonl", "checkpoints"
PACKAGES = ("moe_dist", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def prepare(config: RunConfig, *, resume: str, overwrite: bool, world: int) -> Path | None:
    """Make the run folder ready and return the checkpoint root to resume from, or None to start at step 0.

    For one process only (rank 0); the others wait. `resume`: 'auto' continues what is in the folder, 'never' wants an
    empty one, anything else is the path of a checkpoint, or of a run or checkpoint folder whose newest one is meant.
    Raises UserError where the folder belongs to a different configuration.
    """
    folder = Path(config.run.dir)
    used = (folder / CONFIG).exists()
    if overwrite and used:
        for name in (CHECKPOINTS, "export", "plots", "logs"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (CONFIG, METRICS, "env.json"):
            (folder / name).unlink(missing_ok=True)
        used = False
    if used and resume == "never":
        raise UserError(f"{folder} already holds a run: choose another run.dir, resume it, or give --overwrite")
    if not used and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run of ours: choose another run.dir")
    if used:
        _check_same(config, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save.write_resolved(config, folder / CONFIG)
        (folder / "env.json").write_text(json.dumps(environment(world), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error.strerror}") from None
    if resume not in ("auto", "never"):
        if not Path(resume).is_dir():
            raise UserError(f"--resume {resume}: no such folder")
        return Path(resume)
    return folder / CHECKPOINTS if used else None


def _check_same(config: RunConfig, folder: Path) -> None:
    differing = save.differences(read_mapping(folder / CONFIG), save.to_dict(config))
    if differing:
        raise UserError(
            f"{folder} holds a run of another configuration, which cannot be continued with this one:\n  "
            + "\n  ".join(differing)
            + "\nChoose another run.dir, restore these values, or give --overwrite to start anew"
        )


def environment(world: int) -> dict:
    """Versions and place of the run, for env.json."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "world_size": world,
        "cpus": os.cpu_count(),
    }


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`: a run that resumes from there writes them again. Atomic."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the torn last line of a killed run
        if entry.get("step", 0) <= step:
            kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    os.replace(partial, path)
