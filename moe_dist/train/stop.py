"""Asking a run to stop. A signal only sets a flag; the ranks agree at the next step boundary and save there."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Context in which SIGTERM, SIGUSR1 and Ctrl-C set `requested`; a second Ctrl-C interrupts at once.

    Within another such context it starts with what that one has been asked.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopFlag:
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        outer = getattr(self._previous[signal.SIGTERM], "__self__", None)
        self.requested = isinstance(outer, StopFlag) and outer.requested
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
