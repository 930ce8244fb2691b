"""Brainstorming: from seeds to prompts, and from what the model wrote to single instructions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moe_dist.methods.self_moe.generation.batches import Item, random_for
from moe_dist.methods.self_moe.generation.filters_base import Draft
from moe_dist.methods.self_moe.generation.prompts import INSTRUCTION_SHOTS, Prompts
from moe_dist.methods.self_moe.generation.seeds import Seed

PHASE = "instructions"
FIRST = INSTRUCTION_SHOTS + 1  # number of the first task that the model writes
_BULLET = re.compile(r"^[ \t]*[-*•][ \t]+", re.MULTILINE)


def instruction_item(prompts: Prompts, seeds: Sequence[Seed], *, run_seed: int, skill: str, number: int) -> Item:
    """Prompt `number` of a skill, with three distinct seeds that are drawn for it alone."""
    chosen = random_for(run_seed, skill, PHASE, number).sample(list(seeds), INSTRUCTION_SHOTS)
    text = prompts.instruction_prompt(chosen)
    return Item(f"{skill}-{number:06d}", text, tuple(seed.id for seed in chosen))


def parse_instructions(text: str, *, first: int, tasks: int) -> list[str]:
    """The instructions in what a model wrote after "`first`.", stripped, in order; texts of several lines stay whole.

    Only the next number of the list begins a new instruction, so that steps or options inside of one do not. Where the
    model made a list of bullets instead, each bullet is one. The last may be cut short; the caller knows.
    """
    if _BULLET.match(text.lstrip("\n")):
        return [part.strip() for part in _BULLET.split(text)[1:]]
    parts, rest = [], text
    for number in range(first + 1, tasks + 2):
        before, marker, after = _split(rest, number)
        parts.append(before.strip())
        if not marker:
            break
        rest = after
    return parts


def _split(text: str, number: int) -> tuple[str, str, str]:
    """`text` before, at and after the line that begins with `number`."""
    found = re.search(rf"^[ \t]*(?:task[ \t]+)?{number}[ \t]*[.):](?=\s|$)", text, re.MULTILINE | re.IGNORECASE)
    return (text, "", "") if found is None else (text[: found.start()], found[0], text[found.end() :])


def to_drafts(skill: str, prompt_id: str, text: str, *, finished: bool, tasks: int) -> list[Draft]:
    """The drafts of one completion. Their ids count within the prompt's."""
    found = parse_instructions(text, first=FIRST, tasks=tasks)
    return [
        Draft(f"{prompt_id}-{place:02d}", skill, part, finished=finished or place < len(found) - 1)
        for place, part in enumerate(found)
    ]
