"""What a process was at, and what it died of: from /proc, from its pidfd, and from faulthandler's dump."""

import os
import signal
import struct
import time
from pathlib import Path

from moe_dist.errors import EXIT_OK

# ioctl PIDFD_GET_INFO of Linux 6.15: the exit status also of a process that its parent has waited for already.
_INFO = struct.Struct("<QQ11Ii")
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_INFO_EXIT = 1 << 3
_PATIENCE = 0.3  # seconds that a process may take from its end to where the system knows of it
# The innermost line of a thread that waits for other ranks.
_WAITS = ("/torch/distributed/", "/moe_dist/parallel/collectives.py")
_CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")


def state_and_status(pid: int) -> tuple[str, int | None]:
    """(state letter of a process, its exit status as `wait` would tell); ('?', None) where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "?", None
    return fields[0], int(fields[-1])


def exit_status(pid: int, pidfd: int | None) -> int | None:
    """The status of a process that has ended, whether its parent knows it yet or not; None where nobody can tell."""
    end = time.monotonic() + _PATIENCE
    while True:
        state, status = state_and_status(pid)
        if state == "Z":
            return status
        status = _status_by(pidfd)
        if status is not None or time.monotonic() > end:
            return status
        time.sleep(0.01)


def _status_by(pidfd: int | None) -> int | None:
    if pidfd is None:
        return None
    import fcntl

    info = bytearray(_INFO.pack(_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info)
    except OSError:
        return None
    mask, *_, code = _INFO.unpack(info)
    return code if mask & _INFO_EXIT else None


def cause_of(status: int | None) -> str:
    """How a rank that has said nothing has ended, for a line that begins with its name."""
    if status is not None and os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        if name == "SIGKILL":
            return "was killed (SIGKILL): out of memory (its host's `dmesg` tells), by the scheduler, or by hand"
        return f"{'crashed' if name in _CRASHES else 'was ended'} ({name})"
    if status is not None:
        code = os.WEXITSTATUS(status)
        return (
            f"ended without a word, exit code {code}, before the run was over"
            if code == EXIT_OK
            else (f"ended without a word, exit code {code}")
        )
    return "ended without a word: killed, or crashed"


def read_stack(text: str) -> tuple[bool | None, str]:
    """From faulthandler's dump: (whether a thread waits for other ranks, where the main thread is).

    None: there is no dump, as of a process that is stopped.
    """
    threads = [
        [line.strip() for line in block.splitlines() if line.strip().startswith("File ")]
        for block in text.split("\n\n")
    ]
    threads = [frames for frames in threads if frames]
    if not threads:
        return None, ""
    # The main thread is the oldest, and the last of the dump.
    return any(place in frames[0] for frames in threads for place in _WAITS), _short(threads[-1])


def _short(frames: list[str]) -> str:
    """The innermost line of ours, else the innermost one: 'data/loader.py:113 in next_batch'."""
    frame = next((frame for frame in frames if "/moe_dist/" in frame), frames[0])
    path, _, rest = frame.removeprefix('File "').partition('"')
    line, _, function = rest.removeprefix(", line ").partition(" in ")
    return f"{'/'.join(path.split('/')[-2:])}:{line} in {function}"
