"""Which checkpoint to go on from, and what there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_dist.checkpoint.best import best_name
from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.folders import clear_stale, read_latest, step_folders
from moe_dist.checkpoint.format import check_sizes, read_manifest, stale_of, step_of
from moe_dist.checkpoint.group import SINGLE, Group, all_or_none
from moe_dist.checkpoint.retention import is_pinned
from moe_dist.checkpoint.verify import verify as verify_all


@dataclass(frozen=True)
class Found:
    """`path` is the checkpoint to resume from, None if there is none; `notes` say what was passed over, and why."""

    path: Path | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """A line of `ls`. `problem` is what keeps a folder from being a complete checkpoint; hashes are not looked at."""

    name: str
    step: int
    bytes: int
    latest: bool
    best: bool
    pinned: bool
    problem: str | None


def find_latest(root: str | Path, *, verify: str = "full", clear: bool = False, group: Group = SINGLE) -> Found:
    """Collective: the newest complete checkpoint under `root`.

    Newest is the one saved last, which after going back to an older step need not have the highest number. `latest`
    normally names it; where it does not (missing, empty, naming nothing, or a kill between the rename and its move),
    the folders are looked through and a note says so. verify: "full" reads every byte, shared out over the ranks, and
    passes over a damaged checkpoint; "sizes" looks at files' sizes only. clear: remove what saves that were cut off
    left; for the run that owns the folder only, since its save may be under way. All ranks get the same answer.
    """
    assert verify in ("sizes", "full"), verify
    root = Path(root)
    looked = all_or_none(
        group,
        lambda: _look(root, clear) if group.rank == 0 else None,
        what=f"{root} could not be searched for checkpoints",
    )
    candidates, notes = looked[0]
    for name in candidates:
        report = verify_all(root / name, group=group) if verify == "full" else None
        if report is None or report.ok:
            return Found(root / name, tuple(notes))
        notes.append(f"{name} is passed over: {report.brief()}")
    return Found(None, tuple(notes))


def _look(root: Path, clear: bool) -> tuple[list[str], list[str]]:
    """(names of complete folders, newest first; notes)."""
    if not root.is_dir():
        return [], []
    notes = clear_stale(root) if clear else []
    serials: dict[str, int] = {}
    for path in step_folders(root):
        try:
            serials[path.name] = check_sizes(path).serial
        except CheckpointError as error:
            notes.append(f"{path.name} is passed over: {error}")
    candidates = sorted(serials, key=lambda name: -serials[name])
    named, reason = read_latest(root)
    if reason and (candidates or notes):
        notes.append(f"{reason}; the folders were looked through instead")
    elif candidates and named in serials and named != candidates[0]:
        notes.append(f"`latest` says {named}, but {candidates[0]} was saved after it")
    return candidates, notes


def ls(root: str | Path) -> list[Entry]:
    """Every checkpoint folder under `root`, by step, with the leftovers of saves that were cut off at the end."""
    root = Path(root)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder of checkpoints")
    named, _ = read_latest(root)
    best, entries = best_name(root), []
    for path in step_folders(root):
        size, problem = 0, None
        try:
            size = read_manifest(path).bytes
            check_sizes(path)
        except CheckpointError as error:
            problem = str(error)
        marks = path.name == named, path.name == best, is_pinned(path)
        entries.append(Entry(path.name, step_of(path.name) or 0, size, *marks, problem))
    for path in sorted(root.iterdir()):
        stale = stale_of(path.name)
        if stale is not None:
            step = step_of(stale[0]) or 0
            entries.append(Entry(path.name, step, 0, False, False, False, "left by a save that was cut off"))
    return entries
