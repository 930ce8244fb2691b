"""Which checkpoints to keep. What is removed can never be the last one that works."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from moe_dist.checkpoint.best import best_name
from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.folders import step_folders
from moe_dist.checkpoint.format import check_sizes, stale_of
from moe_dist.checkpoint.group import SINGLE, Group, all_or_none
from moe_dist.checkpoint.verify import verify

PINNED = "pinned"


def pin(path: str | Path) -> None:
    """Keep this checkpoint for good: an empty file `pinned` in its folder, which a user may make or remove by hand."""
    (Path(path) / PINNED).touch()


def is_pinned(path: Path) -> bool:
    return (path / PINNED).exists()


def prune(root: str | Path, *, keep: int, whole: str | None = None, group: Group = SINGLE) -> list[str]:
    """Collective: remove complete checkpoints but the `keep` newest, the pinned and the best; returns what was removed.

    Before anything goes, one of the newest is read back in full (the files shared out over the ranks) and has to be
    whole; if none is, the search goes on into the older ones and the first whole one stays too. Folders that are not
    complete are left for their owner to look at, and nothing is removed while a save is under way.

    whole: the name of a checkpoint that has been read back already, so that none has to be.
    """
    assert keep >= 1, keep
    root = Path(root)
    what = f"old checkpoints in {root} were not removed"
    newest_first, spared = all_or_none(group, lambda: _complete(root) if group.rank == 0 else None, what=what)[0]
    doomed = [name for name in newest_first[keep:] if name not in spared]
    if not doomed:
        return []
    if whole not in newest_first:
        whole = next((name for name in newest_first if verify(root / name, group=group).ok), None)
    if whole is None:
        return []
    doomed = [name for name in doomed if name != whole]
    all_or_none(group, lambda: _remove(root, doomed) if group.rank == 0 else None, what=what)
    return doomed


def _complete(root: Path) -> tuple[list[str], set[str]]:
    """(names of complete checkpoints, newest first; those that stay whatever their age); none while one is saved."""
    if not root.is_dir() or any(stale_of(path.name) for path in root.iterdir()):
        return [], set()
    serials = {}
    for path in step_folders(root):
        try:
            serials[path.name] = check_sizes(path).serial
        except CheckpointError:
            continue
    names = sorted(serials, key=lambda name: -serials[name])
    best = best_name(root)
    return names, {name for name in names if name == best or is_pinned(root / name)}


def _remove(root: Path, names: list[str]) -> None:
    for name in names:
        # Out of sight first: a removal that is cut off leaves nothing that looks like a checkpoint.
        out_of_sight = root / f"{name}.tmp-{secrets.token_hex(4)}"
        os.rename(root / name, out_of_sight)
        shutil.rmtree(out_of_sight)
