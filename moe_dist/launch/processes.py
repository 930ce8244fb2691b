"""Reaching the ranks below a launcher: a signal to the launcher itself ends them unsaved, or not at all.

The deepspeed launcher dies of SIGTERM and leaves its ranks running; torchrun gives its ranks a session of their own.
So a request to stop goes to the ranks directly: those below us that have RANK in their environment. Reads /proc; on
systems without it there is nothing below to be found.
"""

import contextlib
import os
import signal
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Process ids of the children of `pid`, their children, and so on."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold anything; the parent's id is the second word after it.
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def is_rank(pid: int) -> bool:
    """Whether a launcher started this process as a rank."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(variable.startswith(b"RANK=") for variable in variables)


def ask_to_stop(pid: int) -> None:
    """SIGTERM to the ranks at or below `pid`; where there are none yet, to the whole tree."""
    tree = [pid, *descendants(pid)]
    _signal([process for process in tree if is_rank(process)] or tree, signal.SIGTERM)


def kill(pid: int) -> None:
    """SIGKILL to `pid` and everything below it."""
    _signal([pid, *descendants(pid)], signal.SIGKILL)


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
