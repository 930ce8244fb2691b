"""Answering: five seed pairs in context, then the new instruction."""

from __future__ import annotations

from collections.abc import Sequence

from moe_dist.methods.self_moe.generation.batches import Item, random_for
from moe_dist.methods.self_moe.generation.prompts import RESPONSE_SHOTS, Prompts
from moe_dist.methods.self_moe.generation.seeds import Seed

PHASE = "responses"


def response_item(
    prompts: Prompts, seeds: Sequence[Seed], *, run_seed: int, skill: str, draft_id: str, instruction: str
) -> Item:
    """The prompt for one instruction, with five distinct seed pairs that are drawn for it alone."""
    chosen = random_for(run_seed, skill, PHASE, draft_id).sample(list(seeds), RESPONSE_SHOTS)
    return Item(draft_id, prompts.response_prompt(chosen, instruction), tuple(seed.id for seed in chosen))
