"""What `generate --dry-run` prints: everything that can be known without model, weights or seed files."""

from __future__ import annotations

from pathlib import Path

from moe_dist.methods.self_moe.generation.config import GenerateConfig
from moe_dist.methods.self_moe.generation.prompts import INSTRUCTION_SHOTS, RESPONSE_SHOTS, read_prompts
from moe_dist.methods.self_moe.generation.seeds import read_seeds


def describe(config: GenerateConfig, out: str) -> list[str]:
    """The run in lines. Seed files that are there are read and checked; that one is absent is said, and no error."""
    section = config.generate
    if section.backend == "server":
        model = f"{config.server.model} at {config.server.url}"
    else:
        model = section.model + (f" in {section.dtype}" if section.dtype else "")
    lines = [
        f"{model} writes {section.count:,} records for each of {len(section.seeds)} skill(s) into {out}",
        f"instructions: {INSTRUCTION_SHOTS} seeds in context, temperature {section.temperature:g}, top-p "
        f"{section.top_p:g}, at most {section.instruction_tokens:,} tokens; at most "
        f"{section.most_prompts:,} prompts of each skill",
        f"answers: {RESPONSE_SHOTS} seed pairs in context, greedy, at most {section.response_tokens:,} tokens",
        f"batches of {section.batch_size}, seed {section.seed}",
    ]
    for skill, path in section.seeds.items():
        prompts = read_prompts(skill, section.prompts.get(skill))
        known = "not there yet"
        if Path(path).expanduser().exists():
            known = f"{len(read_seeds(path, skill=skill, least=RESPONSE_SHOTS)):,} seeds"
        lines.append(f"{skill}: {path}, {known}; prompts: {prompts.origin}")
    return lines
