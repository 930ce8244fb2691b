"""What may befall a rank, and where."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time

from moe_dist.checkpoint import writer
from moe_dist.data.loader import TrainData
from moe_dist.train import loop

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
    if rank != victim:
        return
    act, _ = KINDS[kind]
    if place == "loading":
        _before(loop, "build_model", act, 1)
    elif place == "data":
        _before(TrainData, "next_batch", act, 3)
    elif place == "forward":
        _before(loop, "label_loss_sum", act, 3)
    elif place == "checkpoint":
        _before(writer._Save, "write", act, 1)
    elif place == "evaluation":
        _before(loop, "held_out", act, 1)
    elif place == "backward":
        _in_backward(act)


def _before(owner, name: str, act, call: int) -> None:
    """Have `act` happen before the `call`-th call of a function."""
    original, calls = getattr(owner, name), []

    def patched(*args, **options):
        calls.append(name)
        if len(calls) == call:
            act()
        return original(*args, **options)

    setattr(owner, name, patched)


def _in_backward(act) -> None:
    original, calls = loop.label_loss_sum, []

    def patched(logits_BLV, labels_BL):
        calls.append(1)
        if len(calls) == 3:
            logits_BLV.register_hook(lambda gradient: act())
        return original(logits_BLV, labels_BL)

    loop.label_loss_sum = patched
