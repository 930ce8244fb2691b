"""The ranks of a proof that was started without a launcher: so many processes on this machine, on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from moe_dist.errors import HostFailure
from moe_dist.launch.environment import free_port
from moe_dist.launch.processes import kill

GRACE = 30.0  # seconds that the others get to end by themselves, once one has


def start_here(arguments: Sequence[str], ranks: int, *, timeout: float) -> int:
    """Run `moe-dist ARGUMENTS` on so many ranks of this machine; the exit code of the first that did not end well.

    What is set for one rank alone is taken from this process. Raises HostFailure after `timeout` seconds.
    """
    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "MOE_DIST_DEVICE": "cpu",
    }
    command = [sys.executable, "-m", "moe_dist", *arguments]
    started = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)
    ]
    try:
        return _wait(started, time.monotonic() + timeout, timeout)
    finally:
        for process in started:
            if process.poll() is None:
                kill(process.pid)
            process.wait()


def _wait(started: list[subprocess.Popen], deadline: float, timeout: float) -> int:
    code = 0
    while any(process.poll() is None for process in started):
        if time.monotonic() > deadline:
            if code:
                return code
            raise HostFailure(
                f"the {len(started)} ranks did not end within {timeout:.0f} s; --timeout is how long they may"
            )
        ended = [process.returncode for process in started if process.returncode]
        if ended and not code:
            code, deadline = ended[0], min(deadline, time.monotonic() + GRACE)
        time.sleep(0.05)
    codes = [process.returncode for process in started]
    code = code or next((code for code in codes if code), 0)
    return 128 + signal.Signals(-code) if code < 0 else code
