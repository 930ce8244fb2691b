"""What may befall a rank, and where."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time

from moe_dist.checkpoint import writer
from moe_dist.data.loader import TrainData
from moe_dist.train import loop, passes

HANG_TIMEOUT = 8  # seconds, where a test waits for it


def _raise():
    raise ValueError("something broke")


def _memory():
    raise MemoryError("no more")


def _hold_the_gil():
    re.match("(a+)+$", "a" * 64 + "b")  # backtracks for years, in C


# name -> (what happens, what the line about it has to say)
KINDS = {
    "exception": (_raise, "failed: ValueError: something broke"),
    "out of memory": (_memory, "failed: MemoryError"),
    "segfault": (lambda: ctypes.string_at(0), "crashed (SIGSEGV)"),
    "abort": (os.abort, "crashed (SIGABRT)"),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed (SIGKILL)"),
    "exit": (lambda: os._exit(0), "ended without a word"),
    "hang": (lambda: time.sleep(3600), "hangs: no progress for"),
    "GIL": (_hold_the_gil, "hangs: no progress for"),
    "stop": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "is stopped (SIGSTOP)"),
}
STACKLESS = ("kill", "exit", "stop")
# name -> what the line calls it
PLACES = {
    "loading": "loading the model",
    "data": "reading a batch",
    "forward": "step 2, forward",
    "backward": "backward",
    "checkpoint": "saving",
    "evaluation": "evaluation",
}


def harm(rank: int, victim: int, kind: str, place: str) -> None:
    """On the victim: have it happen there, early in the run."""
    if rank == victim:
        at_place(rank, place, KINDS[kind][0], 3 if place in ("data", "forward", "backward") else 1)


def harm_a_forward(rank: int, victim: int, kind: str, call: int) -> None:
    """On the victim: have it happen in its `call`-th forward."""
    if rank == victim:
        at_place(rank, "forward", KINDS[kind][0], call)


def at_place(rank: int, place: str, act, call: int) -> None:
    """Have `act` happen where this process comes to `place` the `call`-th time."""
    owner, name = {
        "loading": (loop, "build_model"),
        "data": (TrainData, "next_batch"),
        "forward": (passes, "model_inputs"),
        "backward": (passes, "target_loss_sum"),
        "checkpoint": (writer._Save, "write"),
        "evaluation": (loop, "held_out"),
    }[place]
    original, calls = getattr(owner, name), []

    def patched(*args, **options):
        calls.append(name)
        if len(calls) == call and place == "backward":
            args[0].register_hook(lambda gradient: act())
        elif len(calls) == call:
            act()
        return original(*args, **options)

    setattr(owner, name, patched)
