"""The best checkpoint by held-out loss. `best` in the checkpoints folder names it, and retention spares it.

Which one it is is a matter of the run, which keeps the figures in the trainer state; the file only says so to others.
"""

from __future__ import annotations

from pathlib import Path

from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.folders import point
from moe_dist.checkpoint.format import BEST, step_name, step_of
from moe_dist.checkpoint.group import SINGLE, Group, all_or_none


def mark_best(root: str | Path, step: int | None, *, group: Group = SINGLE) -> None:
    """Collective: make `best` name the checkpoint of that step, by atomic replace; None takes the name away.

    Nothing is written where it says so already. Raises CheckpointError on every rank alike, the old name untouched.
    """
    root = Path(root)
    all_or_none(
        group,
        lambda: _mark(root, step) if group.rank == 0 else None,
        what=f"`best` in {root} could not be moved to step {step}",
    )


def best_step(root: str | Path, *, group: Group = SINGLE) -> int | None:
    """Collective: the step that `best` names, None where the run keeps no best.

    Raises CheckpointError on every rank alike where the file names nothing that is there.
    """
    what = f"the best checkpoint in {root} is not known"
    return all_or_none(group, lambda: read_best(Path(root)) if group.rank == 0 else None, what=what)[0]


def read_best(root: Path) -> int | None:
    """`best_step` of one process."""
    try:
        name = (root / BEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{root / BEST} is not readable ({error})") from None
    step = step_of(name)
    if step is None or not (root / name).is_dir():
        raise CheckpointError(
            f"{root / BEST} says {name!r}, which is no checkpoint there; name a checkpoint, or remove that file"
        )
    return step


def best_name(root: Path) -> str | None:
    """The folder that `best` names, for one process that lists or clears up: a name of nothing counts as none."""
    try:
        step = read_best(root)
    except CheckpointError:
        return None
    return None if step is None else step_name(step)


def _mark(root: Path, step: int | None) -> None:
    if step is None:
        (root / BEST).unlink(missing_ok=True)
        return
    wanted = step_name(step)
    if not (root / wanted).is_dir():
        raise CheckpointError(f"{root / wanted} is not there")
    try:
        said = (root / BEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        said = None
    if said != wanted:
        point(root, BEST, wanted)
