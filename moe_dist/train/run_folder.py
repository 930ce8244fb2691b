"""The run folder: what a run writes, and whether a command may write there.

    config.resolved.yaml   the configuration, secrets redacted
    env.json               versions, host, ranks
    experts_backend.json   with moe.experts_backend=measured: what was measured and chosen
    metrics.jsonl          one line an event, always
    checkpoints/           step-N/ and latest
    launch/                what launchers keep there, already before the first start: scripts, logs, requests to stop
    logs/                  what ranks that failed have left; the first start may fail before it writes anything else
    export/                the Hugging Face folder, once exported

The same command again resumes. A folder of another run is never written into silently.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from moe_dist.config import save
from moe_dist.config.load import read_mapping
from moe_dist.config.schema import RunConfig
from moe_dist.errors import UserError
from moe_dist.launch.chain import FOLDER as LAUNCH
from moe_dist.launch.chain import STOP

CONFIG, METRICS, CHECKPOINTS = "config.resolved.yaml", "metrics.jsonl", "checkpoints"
ENVIRONMENT, EXPERTS_BACKEND = "env.json", "experts_backend.json"
LOGS = "logs"
EARLY = (LAUNCH, LOGS)  # what may be there before a run is
STOP_FILE = f"{LAUNCH}/{STOP}"  # exists while somebody asks the run to save and end
PACKAGES = ("moe_dist", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def check(config: RunConfig, *, resume: str, overwrite: bool, may_differ: Sequence[str] = ()) -> Path | None:
    """Where to resume from: the folder of a checkpoint or of several, or None to start at step 0. Writes nothing.

    For one process only (rank 0); the others wait. `resume`: 'auto' continues what is in the folder, 'never' wants an
    empty one, anything else is the path of a checkpoint, or of a run or checkpoint folder whose newest one is meant.
    Raises UserError where the folder belongs to a different configuration; keys of `may_differ` ("train.lr") aside.
    """
    folder = Path(config.run.dir)
    used = (folder / CONFIG).exists() and not overwrite
    if used and resume == "never":
        raise UserError(f"{folder} already holds a run: choose another run.dir, resume it, or give --overwrite")
    if (
        not (folder / CONFIG).exists()
        and folder.is_dir()
        and any(entry.name not in EARLY for entry in folder.iterdir())
    ):
        raise UserError(f"{folder} is not empty and holds no run of ours: choose another run.dir")
    if used:
        _check_same(config, folder, may_differ)
    if resume not in ("auto", "never"):
        if not Path(resume).is_dir():
            raise UserError(f"--resume {resume}: no such folder")
        return Path(resume)
    return folder / CHECKPOINTS if used else None


def write(config: RunConfig, *, overwrite: bool, world: int) -> None:
    """Make the run folder ready for this run; with `overwrite`, what an earlier run left in it goes. Rank 0 only."""
    folder = Path(config.run.dir)
    if overwrite and (folder / CONFIG).exists():
        for name in (CHECKPOINTS, "export", "plots", LOGS):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (CONFIG, METRICS, ENVIRONMENT, EXPERTS_BACKEND):
            (folder / name).unlink(missing_ok=True)
    new = not (folder / CONFIG).exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save.write_resolved(config, folder / CONFIG)
        _replace(folder / ENVIRONMENT, json.dumps(environment(world), indent=1) + "\n")
    except OSError as error:
        with contextlib.suppress(OSError):
            for path in [*folder.glob("*.partial"), *([folder / CONFIG] if new else [])]:
                path.unlink(missing_ok=True)
        raise UserError(f"cannot write the run folder {folder}: {error.strerror}") from None


def _check_same(config: RunConfig, folder: Path, may_differ: Sequence[str]) -> None:
    lines = save.differences(read_mapping(folder / CONFIG), save.to_dict(config))
    free = tuple(f"{key}{end}" for key in may_differ for end in (":", "."))  # "train.betas" is "train.betas.1", too
    differing = [line for line in lines if not line.startswith(free)]
    if differing:
        raise UserError(
            f"{folder} holds a run of another configuration, which cannot be continued with this one:\n  "
            + "\n  ".join(differing)
            + "\nChoose another run.dir, restore these values, or give --overwrite to start anew. A run that is "
            "meant to go on with another value says so, as in --allow-config-drift train.lr"
        )


def versions() -> dict[str, str | None]:
    """Of the packages that matter; None for one that is not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def environment(world: int) -> dict:
    """Versions and place of the run, for env.json."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "world_size": world,
        "cpus": os.cpu_count(),
    }


def cut_metrics(path: Path, step: int, *, ended: bool = False) -> None:
    """Drop the lines of steps after `step`: a run that resumes from there writes them again. Atomic.

    ended: there is no step left to do, so that the run will only evaluate once more: that line goes as well.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the torn last line of a killed run
        again = ended and entry.get("event") == "eval" and entry.get("step") == step
        if entry.get("step", 0) <= step and not again:
            kept.append(line)
    _replace(path, "".join(line + "\n" for line in kept))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)
