"""Batches: prompts with fixed ids, cut alike for any number of ranks, each with random numbers of its own."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.data.fingerprint import digest
from moe_dist.methods.self_moe.generation.backend import Sampling


def derive_seed(*names: object) -> int:
    """A number below 2**63 that follows from the names alone, on any machine."""
    text = "/".join(map(str, names))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1


def random_for(*names: object) -> random.Random:
    """Random numbers that follow from the names alone."""
    return random.Random(derive_seed(*names))


@dataclass(frozen=True)
class Item:
    """One prompt. id: the prompt's, or that of the draft which it answers. seeds: ids of those in its context."""

    id: str
    prompt: str
    seeds: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Prompts that are generated together, on one rank. index: its place among all of its skill and phase.

    samples: further completions of every prompt, drawn as `sample_by` says.
    """

    skill: str
    phase: str
    index: int
    items: tuple[Item, ...]
    sampling: Sampling
    run_seed: int
    samples: int = 0
    sample_by: Sampling | None = None

    @property
    def name(self) -> str:
        """`skill/phase-index`."""
        return f"{self.skill}/{self.phase}-{self.index:06d}"

    @property
    def seed(self) -> int:
        """Seed of its random numbers, whichever rank draws them."""
        return derive_seed(self.run_seed, self.skill, self.phase, self.index)

    def digest(self, identity: dict) -> str:
        """Hex sha256 of all that decides its completions; identity: the backend's."""
        prompts = [[item.id, item.prompt] for item in self.items]
        sampling = [self.sampling.as_dict(), self.samples, self.sample_by.as_dict() if self.sample_by else None]
        return digest([self.name, prompts, sampling, self.seed, identity])


def cut(items: Sequence[Item], *, first: int, size: int, **common) -> list[Batch]:
    """Batches of `size` items (the last may be smaller), numbered from `first`. common: the other fields of a Batch.

    Prompts of like length go together, which saves padding; the order follows from the items, not from who runs them.
    """
    ordered = sorted(items, key=lambda item: (-len(item.prompt), item.id))
    return [
        Batch(index=first + place, items=tuple(ordered[start : start + size]), **common)
        for place, start in enumerate(range(0, len(ordered), size))
    ]
