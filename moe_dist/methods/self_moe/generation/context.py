"""Whether the prompts of a skill fit the model, checked before anything is generated."""

from __future__ import annotations

from collections.abc import Sequence

from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.backend import Backend
from moe_dist.methods.self_moe.generation.config import GenerateSection
from moe_dist.methods.self_moe.generation.prompts import INSTRUCTION_SHOTS, RESPONSE_SHOTS, Prompts
from moe_dist.methods.self_moe.generation.seeds import Seed


def check_context(
    skill: str, seeds: Sequence[Seed], prompts: Prompts, section: GenerateSection, backend: Backend
) -> None:
    """Raise UserError where the longest seeds, drawn together, leave no room for what is to be generated.

    The number of seeds in a prompt is part of the method, so none is left out to make it fit.
    """
    if backend.context is None:
        return
    by_instruction = backend.count([seed.instruction for seed in seeds])
    if by_instruction is None:
        return
    by_pair = backend.count([prompts.response_prompt([seed], "") for seed in seeds])
    for what, shots, lengths, tokens, render in (
        ("instruction", INSTRUCTION_SHOTS, by_instruction, section.instruction_tokens, prompts.instruction_prompt),
        ("response", RESPONSE_SHOTS, by_pair, section.response_tokens, lambda chosen: _response(prompts, chosen)),
    ):
        order = sorted(range(len(seeds)), key=lambda place: -lengths[place])
        longest = [seeds[place] for place in order[:shots]]
        (needed,) = backend.count([render(longest)])
        if needed + tokens > backend.context:
            raise UserError(
                f"generate.seeds.{skill}: a prompt with the {shots} longest seeds takes {needed:,} tokens, and "
                f"generate.{what}_tokens={tokens:,} come on top; the model's context is {backend.context:,}. Shorten "
                f"{longest[0].origin}, then {longest[1].origin} and so on, lower generate.{what}_tokens, or take a "
                "model with a longer context"
            )


def _response(prompts: Prompts, chosen: Sequence[Seed]) -> str:
    """A response prompt for an instruction as short as the shortest of the seeds shown."""
    return prompts.response_prompt(chosen, min((seed.instruction for seed in chosen), key=len))
