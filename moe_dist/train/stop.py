"""Asking a run to stop. A signal or a file only sets a flag; the ranks agree before the next step and save there."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
# Cancelling and preempting send several signals at once; only the same one again, later, means "now".
INSIST = 2.0


class StopFlag:
    """Context in which SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and Ctrl-C set `requested`.

    A second Ctrl-C interrupts at once, and so does any of the others that comes again after INSIST seconds. SIGHUP
    stays ignored under nohup.

    file: a path whose existence asks as well, where signals do not reach the ranks: those of the deepspeed launcher on
    other machines, say. Within another such context it starts with what that one has been asked.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._signalled = False
        self._came: dict[int, float] = {}
        self._file = file

    @property
    def requested(self) -> bool:
        return self._signalled or (self._file is not None and self._file.exists())

    def __enter__(self) -> StopFlag:
        ours = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._on_signal) for number in ours}
        outer = getattr(self._previous[signal.SIGTERM], "__self__", None)
        self._signalled = isinstance(outer, StopFlag) and outer.requested
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first = self._came.setdefault(number, time.monotonic())
        if self._signalled and (number == signal.SIGINT or time.monotonic() - first > INSIST):
            raise KeyboardInterrupt(f"a second {signal.Signals(number).name}")
        self._signalled = True
