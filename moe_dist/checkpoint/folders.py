"""Folders of checkpoints: making one visible in one step, moving `latest`, and clearing what a killed save left."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from pathlib import Path

from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.format import BEST, LATEST, read_manifest, stale_of, step_name, step_of


def new_temporary(root: Path, step: int) -> Path:
    """An empty folder beside the others that no reader takes for a checkpoint."""
    path = root / f"{step_name(step)}.tmp-{secrets.token_hex(4)}"
    path.mkdir()
    return path


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its name. One of that name that is there already is replaced.

    A folder cannot be renamed onto a full one, so the old one steps aside first. A kill between the two renames leaves
    it as `.old-...`, and `clear_stale` puts it back.
    """
    aside = None
    if final.exists():
        aside = final.with_name(f"{final.name}.old-{secrets.token_hex(4)}")
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    sync_folder(final.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)  # what stays is stale, and the next save clears it


def point_latest(root: Path, name: str) -> None:
    """Make `latest` say `name`."""
    point(root, LATEST, name)


def point(root: Path, pointer: str, name: str) -> None:
    """Make the file `pointer` say `name`; a reader sees the old name or the new one, never a half."""
    temporary = root / f"{pointer}.tmp-{secrets.token_hex(4)}"
    with open(temporary, "x", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / pointer)
    sync_folder(root)


def read_latest(root: Path) -> tuple[str | None, str | None]:
    """(the step folder that `latest` names, None) or (None, why it names none)."""
    try:
        name = (root / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None, "`latest` is missing"
    except (OSError, UnicodeDecodeError) as error:
        return None, f"`latest` is not readable ({error})"
    if not name:
        return None, "`latest` is empty"
    if step_of(name) is None:
        return None, f"`latest` says {name!r}, which is no step folder of this run"
    if not (root / name).is_dir():
        return None, f"`latest` says {name}, which does not exist"
    return name, None


def step_folders(root: Path) -> list[Path]:
    """Folders named step-N that lie in `root` itself, by step; a link that leads out of it is none."""
    inside = root.resolve()
    folders = [path for path in root.iterdir() if step_of(path.name) is not None and path.is_dir()]
    return sorted((path for path in folders if path.resolve().parent == inside), key=lambda p: step_of(p.name) or 0)


def clear_stale(root: Path) -> list[str]:
    """Remove what saves that were cut off left behind; returns a line for each. For one process, before any save.

    A folder that had stepped aside for a replacement that never came is put back.
    """
    notes = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        stale = stale_of(path.name)
        if path.name.startswith((f"{LATEST}.tmp-", f"{BEST}.tmp-")):
            path.unlink()
        elif stale is not None and path.is_dir() and not path.is_symlink():
            name, state = stale
            if state == "old" and not (root / name).exists() and _has_manifest(path):
                os.rename(path, root / name)
                notes.append(f"{name} was put back: the save that was to replace it was cut off")
            else:
                shutil.rmtree(path)
                notes.append(f"{path.name} was removed: a save that was cut off left it")
    return notes


def _has_manifest(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, as fsync of a file does its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder and say so; they order renames on the server.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def wait_until_visible(path: Path, *, seconds: float, size: int | None = None) -> None:
    """Wait for what another rank has made: a network file system may show it late. CheckpointError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        seen = None
        # A stale handle or a name not yet known are the same to us: not there yet.
        with contextlib.suppress(OSError):
            seen = path.stat().st_size
        if seen is not None and size in (None, seen):
            return
        if time.monotonic() >= deadline:
            state = "is not visible" if seen is None else f"has {seen:,} bytes instead of {size:,}"
            raise CheckpointError(
                f"{path} {state} after {seconds:g} s, though another rank made it; "
                "is the checkpoint folder on a file system that all ranks share?"
            )
        time.sleep(0.05)
