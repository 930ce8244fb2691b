"""The configuration of `moe-dist self-moe generate`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_dist.config.checks import check_bounds, is_local
from moe_dist.config.keys import check_known
from moe_dist.config.load import load_schema
from moe_dist.config.schema import key
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.config_filters import FilterSection
from moe_dist.methods.self_moe.generation.config_server import ServerSection

SKILL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass
class GenerateSection:
    model: str | None = key(None, "The base model: Hugging Face folder or hub name.")
    tokenizer: str | None = key(None, "Folder or hub name of the tokenizer; beside the model when absent.")
    dtype: str | None = key(
        None, "Dtype in which the model is loaded; as stored when absent.", choices=(None, "float32", "bfloat16")
    )
    backend: str = key(
        "local", "What generates: the model on the ranks of this launch, or a server.", choices=("local", "server")
    )
    seeds: dict[str, str] = key({}, "Skill to its seed file: JSONL with instruction, output and perhaps input.")
    prompts: dict[str, str] = key(
        {}, "Skill to its prompt file, or the name of a shipped one; that of the skill's name, or generic, when absent."
    )
    count: int = key(5000, "Records of each skill.", low=1)
    max_prompts: int | None = key(
        None, "Brainstorming prompts of a skill after which it ends with what it has; count, or 64, when absent.", low=1
    )
    batch_size: int = key(16, "Prompts that are generated together.", low=1)
    seed: int = key(0, "Seed of everything random. Equal seeds give equal records on any number of ranks.", low=0)
    temperature: float = key(1.0, "Temperature of brainstorming; answers are greedy.", above=0)
    top_p: float = key(
        0.98, "Brainstorming draws from the smallest set of tokens with this probability.", above=0, high=1
    )
    instruction_tokens: int = key(1024, "Most tokens of one brainstormed list.", low=1)
    response_tokens: int = key(512, "Most tokens of an answer.", low=1)

    @property
    def most_prompts(self) -> int:
        """`max_prompts`, or what it is when absent."""
        return self.max_prompts or max(self.count, 64)


@dataclass
class GenerateConfig:
    generate: GenerateSection = key(GenerateSection, "Model, seeds, and how many records.")
    filters: FilterSection = key(FilterSection, "Which records are kept.")
    server: ServerSection = key(ServerSection, "Where the server is, for generate.backend=server.")
    skill_filters: dict[str, Any] = key({}, "Skill to the keys of `filters` that are different for it.")

    def filters_for(self, skill: str) -> FilterSection:
        """`filters` with what `skill_filters` says of a skill. Raises UserError for a key that there is not."""
        changes = self.skill_filters.get(skill, {})
        place = f"skill_filters.{skill}"
        check_known(changes, origin=place, schema=FilterSection)
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            merged = OmegaConf.merge(OmegaConf.structured(FilterSection), asdict(self.filters), changes)
            section = OmegaConf.to_object(merged)
        except OmegaConfBaseException as error:
            raise UserError(f"{place}: {str(error).splitlines()[0]}") from None
        check_bounds(section)
        section.validate(place if changes else "filters")
        return section


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> GenerateConfig:
    """Read and check the YAML. Raises UserError that names the key and what to do; seed files are not looked for."""
    config = load_schema(path, overrides, GenerateConfig)
    section = config.generate
    if section.backend == "server":
        config.server.validate("server")
    elif section.model is None:
        raise UserError("generate.model is not set: name the base model, a Hugging Face folder or a hub name")
    for name in ("model", "tokenizer"):
        folder = getattr(section, name)
        if folder is not None and is_local(folder) and not os.path.isdir(os.path.expanduser(folder)):
            raise UserError(f"generate.{name}={folder}: no such folder")
    if not section.seeds:
        raise UserError(
            "generate.seeds is empty: name a seed file for each skill, as in generate.seeds.math=math.jsonl"
        )
    for skill in section.seeds:
        if not SKILL.fullmatch(skill):
            raise UserError(f"generate.seeds.{skill}: a skill names files; use letters, digits and ._- (at most 64)")
    for name, given in (("generate.prompts", section.prompts), ("skill_filters", config.skill_filters)):
        for skill in given:
            if skill not in section.seeds:
                raise UserError(f"{name}.{skill}: no such skill; generate.seeds has {', '.join(section.seeds)}")
    for skill in section.seeds:
        config.filters_for(skill)
    return config
