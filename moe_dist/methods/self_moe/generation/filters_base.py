"""What a filter is: it looks at one draft after the other, in a fixed order, and says why one is not kept.

Filters run on one process, instructions before they are answered and whole pairs after, always in the order of their
ids. So a filter may remember what it has seen, and the same run gives the same records on any number of ranks and
after any interruption, when all drafts are shown to it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_dist.methods.self_moe.generation.seeds import Seed

INSTRUCTION, RESPONSE = "instruction", "response"


@dataclass(frozen=True)
class Draft:
    """An instruction, and its answer once there is one (None before).

    finished: whether the model ended the newest text by itself, rather than at the limit of tokens. samples: further
    answers to the same prompt, drawn at random, where `filters.samples` asks for them.
    """

    id: str
    skill: str
    instruction: str
    response: str | None = None
    finished: bool = True
    samples: tuple[str, ...] = ()


class Filter(Protocol):
    """`stage`: INSTRUCTION sees drafts without a response, RESPONSE whole ones. `name`: as provenance lists it.

    One that is slow, and remembers nothing, may have a method `all`: its answers to many drafts, found side by side.
    """

    name: str
    stage: str

    def __call__(self, draft: Draft) -> str | None:
        """None to keep the draft, else the reason in a word or two, under which it is counted."""


def look(test: Filter, drafts: Sequence[Draft]) -> list[str | None]:
    """What a filter says to each draft, in order."""
    return test.all(drafts) if hasattr(test, "all") else [test(draft) for draft in drafts]


class WellFormed:
    """Reasons: unfinished (cut at the limit of tokens), empty."""

    name = "well_formed"

    def __init__(self, stage: str):
        self.stage = stage

    def __call__(self, draft: Draft) -> str | None:
        text = draft.instruction if self.stage == INSTRUCTION else draft.response
        if not draft.finished:
            return f"{self.stage}_unfinished"
        return None if text.strip() else f"{self.stage}_empty"


class NoCopies:
    """Reasons: seed_copy and duplicate, for instructions that are equal but for case and white space."""

    name = "no_copies"
    stage = INSTRUCTION

    def __init__(self, seeds: Sequence[Seed]):
        self._seeds = {_plain(seed.instruction) for seed in seeds}
        self._seen: set[str] = set()

    def __call__(self, draft: Draft) -> str | None:
        text = _plain(draft.instruction)
        if text in self._seeds:
            return "seed_copy"
        if text in self._seen:
            return "duplicate"
        self._seen.add(text)
        return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def first_filters(seeds: Sequence[Seed]) -> list[Filter]:
    """The filters of one skill, in the order in which they look."""
    return [WellFormed(INSTRUCTION), NoCopies(seeds), WellFormed(RESPONSE)]
