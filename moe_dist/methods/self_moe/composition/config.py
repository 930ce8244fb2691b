"""The configuration of `moe-dist self-moe compose`: a base, its experts, and what they become."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.config.checks import is_local
from moe_dist.config.load import load_schema
from moe_dist.config.schema import LoraSection, key
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.config_specialise import ExpertLora

MIXTURES = ("mixse", "joint", "uniform", "random")
MERGES = ("instance", "ties", "dare")


@dataclass
class ComposeSection:
    base: str | None = key(None, "The model that the experts were trained on: folder or hub name.")
    experts: dict[str, str] = key({}, "Skill to the folder of its expert (a LoRA adapter), in the order of experts.")
    method: str = key(
        "mixse", "What they become: see `moe-dist self-moe compose --help`.", choices=(*MIXTURES, *MERGES)
    )
    skills: list[str] = key([], "joint: names of the new experts, which nothing has trained yet.")
    router_input: str = key(
        "block_input",
        "What the router reads: each decoder block's input, or the base's last hidden state, in a pass of its own.",
        choices=("block_input", "base_last_hidden"),
    )
    top_k: int = key(1, "Experts of a token; as many as there are is a dense mixture.", low=1)
    bias: bool = key(False, "Whether the router has a bias (the paper's has none, X-LoRA's has one).")
    density: float | None = key(
        None,
        "Share of each expert's change that a merge keeps; the value of its paper when absent: ties 0.2, dare 0.1.",
        above=0,
        high=1,
    )
    weight: float | None = key(
        None,
        "Factor of each expert's change in a merge; when absent 1 for ties, which takes a mean, and 1/n for dare, "
        "which takes a sum.",
        above=0,
    )
    seed: int = key(0, "Seed of the new router, of random routing, and of what dare drops.", low=0)


@dataclass
class ComposeConfig:
    compose: ComposeSection = key(ComposeSection, "Base, experts, method.")
    lora: LoraSection = key(ExpertLora, "joint: the form of its new experts.")


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> ComposeConfig:
    """Read and check the YAML. Raises UserError that names the key and what to do; no adapter is opened."""
    config = load_schema(path, overrides, ComposeConfig)
    section = config.compose
    if section.base is None:
        raise UserError("compose.base is not set: name the model that the experts were trained on")
    folders = {"base": section.base, **{f"experts.{name}": folder for name, folder in section.experts.items()}}
    for name, folder in folders.items():
        if (name != "base" or is_local(folder)) and not os.path.isdir(os.path.expanduser(folder)):
            raise UserError(f"compose.{name}={folder}: no such folder")
    if section.method == "joint":
        if section.experts or not section.skills:
            raise UserError("compose.method=joint begins with new experts: give compose.skills, and no compose.experts")
        if len(set(section.skills)) < len(section.skills):
            raise UserError("compose.skills names a skill twice")
        if not config.lora.rank:
            raise UserError("lora.rank=0: an expert is a LoRA; give it a rank, such as the paper's 8")
    elif section.skills:
        raise UserError(f"compose.skills is for method joint; method {section.method} takes compose.experts")
    elif not section.experts:
        raise UserError("compose.experts is empty: name each expert's folder, as in compose.experts.math=experts/math")
    if section.method == "instance" and len(section.experts) > 1:
        raise UserError("compose.method=instance takes the one expert that `specialise.instance=true` has trained")
    if section.method not in ("ties", "dare") and (section.density, section.weight) != (None, None):
        raise UserError(f"compose.density and weight are for ties and dare; method {section.method} merges nothing")
    return config
