"""Batches: prompts with fixed ids, cut the same way whatever the number of ranks, each with random numbers of its own."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.data.fingerprint import digest


def derive_seed(*names: object) -> int:
    """A number below 2**63 that follows from the names alone, on any machine."""
    text = "/".join(map(str, names))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1


def random_for(*names: object) -> random.Random:
    """Random numbers that follow from the names alone."""
    return random.Random(derive_seed(*names))


@dataclass(frozen=True)
class Item:
    """One prompt. id: of the prompt or of the draft that it answers. seeds: ids of the seeds in its context, in order."""

    id: str
    prompt: str
    seeds: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Prompts that are generated together, on one rank. Its place among all batches of its skill and phase is `index`."""

    skill: str
    phase: str
    index: int
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        return f"{self.skill}/{self.phase}-{self.index:06d}"

    @property
    def digest(self) -> str:
        """Hex sha256 of its prompts, by which a stored result is recognised."""
        return digest([[item.id, item.prompt, list(item.seeds)] for item in self.items])

    def seed(self, run_seed: int) -> int:
        """Seed of its random numbers, whichever rank draws them."""
        return derive_seed(run_seed, self.skill, self.phase, self.index)


def cut(items: Sequence[Item], *, skill: str, phase: str, first: int, size: int) -> list[Batch]:
    """Batches of `size` items (the last may be smaller), numbered from `first`.

    Prompts of like length go together, which saves padding; the order follows from the items, not from who runs them.
    """
    ordered = sorted(items, key=lambda item: (-len(item.prompt), item.id))
    return [
        Batch(skill, phase, first + place, tuple(ordered[start : start + size]))
        for place, start in enumerate(range(0, len(ordered), size))
    ]
