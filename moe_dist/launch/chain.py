"""Whether a job that has ended is started again: the memory of a chain of starts, in `<run>/launch/`.

    attempt.json   where the run stood at the last start, and how many failures in a row got it no further
    exit           the exit code, written by the first rank that failed, or by rank 0 for success
    stop           exists while the ranks are asked to save and end

Only a run that was stopped after a save (85) or failed for a passing reason (86) is started again. It has to have made
a step since its last start, else it would go round for ever, and of failures in a row only so many are allowed.
"""

import json
import os
from pathlib import Path

from moe_dist.errors import EXIT_OK, EXIT_PREEMPTED, EXIT_TRANSIENT, PolicyStop

FOLDER = "launch"
EXIT, STOP, ATTEMPT = "exit", "stop", "attempt.json"
MOST_FAILURES = 3
_TAIL = 1 << 16  # bytes of metrics.jsonl that surely hold the last step's line


def begin(run: str | os.PathLike) -> None:
    """Note where the run stands, and clear what the start before has left. Call before the ranks start."""
    folder = Path(run) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in (EXIT, STOP):
        (folder / name).unlink(missing_ok=True)
    _write(folder / ATTEMPT, {**_position(Path(run)), "failures": _read(folder / ATTEMPT).get("failures", 0)})


def again(run: str | os.PathLike, *, code: int) -> int:
    """The exit code of the start that has just ended: 85 or 86 where the run is to be started again.

    code: that of the launcher, which counts only where no rank has left a word: then all were killed at once, as by
    the loss of a node. Raises PolicyStop where an 85 or 86 must not be followed by another start.
    """
    folder = Path(run) / FOLDER
    own = _own_code(folder / EXIT)
    if own is None:
        own = EXIT_TRANSIENT
    elif own == EXIT_OK and code != EXIT_OK:
        own = 1  # rank 0 was done; another rank or the launcher failed after it
    if own not in (EXIT_PREEMPTED, EXIT_TRANSIENT):
        return own
    before = _read(folder / ATTEMPT)
    if not _has_progressed(before, _position(Path(run))):
        raise PolicyStop(
            f"no step was made since the last start, which ended with exit code {own}: starting again would repeat "
            f"it. Read the end of the log in {folder}; where the time was too short for a step and a save, give more"
        )
    failures = before.get("failures", 0) + 1 if own == EXIT_TRANSIENT else 0
    _write(folder / ATTEMPT, {**before, "failures": failures})
    if failures > MOST_FAILURES:
        raise PolicyStop(
            f"{failures} starts in a row failed (exit code {EXIT_TRANSIENT}): look for a bad node or network in the "
            f"logs in {folder}, then submit again"
        )
    return own


def _has_progressed(before: dict, now: dict) -> bool:
    """Whether a step was made: a newer checkpoint, or a line of a step beyond the checkpoint at the start.

    Lines of an earlier start do not count: they are those of a file that has not changed since.
    """
    if now["checkpoint"] != before.get("checkpoint"):
        return now["checkpoint"] is not None
    if now["metrics"] == before.get("metrics") or now["step"] is None:
        return False
    resumed_at = int((now["checkpoint"] or "step-0").rpartition("-")[2])
    return now["step"] > resumed_at


def _position(run: Path) -> dict:
    """The newest checkpoint, the last step that metrics.jsonl tells of, and that file's size and time."""
    position = {"checkpoint": None, "step": None, "metrics": None}
    latest, metrics = run / "checkpoints" / "latest", run / "metrics.jsonl"
    if latest.exists():
        name = latest.read_text().strip()
        position["checkpoint"] = name if name.rpartition("-")[2].isdecimal() else None
    if not metrics.exists():
        return position
    status = metrics.stat()
    position["metrics"] = [status.st_size, status.st_mtime_ns]
    with open(metrics, "rb") as file:
        file.seek(max(0, status.st_size - _TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off at either end
        if isinstance(entry, dict) and entry.get("event") == "train" and isinstance(entry.get("step"), int):
            position["step"] = entry["step"]
            break
    return position


def _own_code(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, value: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value) + "\n")
    os.replace(partial, path)
