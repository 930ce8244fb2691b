"""The configuration of specialising: that of a training run with LoRA, with one source of data for each skill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike

from moe_dist.config.load import load_schema
from moe_dist.config.schema import LoraSection, RunConfig, key
from moe_dist.models.adapter import CONFIG
from moe_dist.train.side_by_side.plan import SideBySide, SideBySideSection, Terms, plan_side_by_side, start_of

TERMS = Terms(section="specialise", start="base", noun="skill", marker=CONFIG)
INSTANCE = "instance"


@dataclass
class ExpertLora(LoraSection):
    rank: int = key(8, "Rank of an expert.", low=1)


@dataclass
class SpecialiseSection(SideBySideSection):
    instance: bool = key(
        False,
        "One expert, called instance, on the data of all skills: the baseline. It takes train.steps for each skill, so "
        "that it sees as much of every skill as that skill's own expert.",
    )


@dataclass
class SpecialiseConfig(RunConfig):
    lora: LoraSection = key(ExpertLora, "The form of an expert.")
    specialise: SpecialiseSection = key(SpecialiseSection, "Experts of several skills: how ranks share them.")


def load_specialising(path: str | PathLike, overrides: Sequence[str] = ()) -> SideBySide:
    """Read and check the YAML of `moe-dist self-moe specialise`. Raises UserError that names the key and what to do."""
    tree = asdict(load_schema(path, overrides, SpecialiseConfig))
    section = SpecialiseSection(**tree.pop("specialise"))
    start = start_of(tree, TERMS, origin=str(path))
    skills = {source.name: [asdict(source)] for source in start.data.train}
    if section.instance:
        start.train.steps *= len(skills)
        skills = {INSTANCE: [source for sources in skills.values() for source in sources]}
    return plan_side_by_side(start, TERMS, skills, section)
