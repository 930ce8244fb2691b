"""How far generation is: tokens a second over all ranks, and when the phase will be done."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from moe_dist.methods.self_moe.generation.board import Board
from moe_dist.methods.self_moe.generation.rounds import SkillRun

LINE_SECONDS, TERMINAL_SECONDS = 5.0, 0.5
TOKENS = "tokens"
FLUSH_SECONDS = 0.5


class TokenCount:
    """Adds tokens to the board a few times a second; called once a decoding step it would be asked too often."""

    def __init__(self, board: Board):
        self.board, self.waiting, self.last = board, 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self.waiting += count
        if time.monotonic() - self.last >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self.board.add(TOKENS, self.waiting)
        self.waiting, self.last = 0, time.monotonic()


@contextmanager
def shown(
    title: str, board: Board, *, done: str, total: int, say: Callable[[str], None] | None, terminal: bool
) -> Iterator[None]:
    """While it lasts, a thread says how far the counter `done` is on its way to `total`; `say` None keeps silent.

    terminal: one line is written over and over; else there is one every few seconds.
    """
    if say is None:
        yield
        return
    start, first, ended = time.monotonic(), (board.read(done), board.read(TOKENS)), threading.Event()

    def line() -> str:
        seconds = time.monotonic() - start
        count, tokens = board.read(done), board.read(TOKENS) - first[1]
        return describe(title, count, total, new=count - first[0], tokens=tokens, seconds=seconds)

    def watch() -> None:
        while not ended.wait(TERMINAL_SECONDS if terminal else LINE_SECONDS):
            if terminal:
                sys.stdout.write(f"\r\x1b[K{line()}")
                sys.stdout.flush()
            else:
                say(line())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if terminal:
            sys.stdout.write("\r\x1b[K")
        say(line())


def describe(title: str, count: int, total: int, *, new: int, tokens: int, seconds: float) -> str:
    """One line. new: how many of `count` came within these `seconds`."""
    rate = tokens / seconds if seconds > 0 else 0.0
    text = f"{title}: {count:,}/{total:,}, {rate:,.0f} tokens/s"
    if count >= total:
        return f"{text}, {spell(seconds)}"
    return f"{text}, about {spell(seconds / new * (total - count))} left" if new else text


def describe_records(skills: Iterable[SkillRun], *, seconds: float) -> str:
    """How many records each skill has after these seconds, and when all will have theirs at this rate."""
    skills = list(skills)
    text = "records: " + ", ".join(f"{run.skill} {len(run.records):,}/{run.section.count:,}" for run in skills)
    have, missing = sum(len(run.records) for run in skills), sum(run.missing for run in skills)
    return f"{text}; about {spell(seconds / have * missing)} left" if have and missing else text


def spell(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
