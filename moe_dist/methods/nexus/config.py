"""The configuration of the Nexus verbs: the seed model, the domains' text, and how they become one model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.config.checks import is_local
from moe_dist.config.load import load_schema
from moe_dist.config.schema import DataSection, key
from moe_dist.errors import UserError

METHODS = ("nexus", "linear", "btx", "sparse_upcycling", "dense_merging")
SEED = "seed"


@dataclass
class NexusSection:
    seed: str | None = key(None, "The dense model that the experts were trained from: folder or hub name.")
    tokenizer: str | None = key(None, "Folder or hub name of the tokenizer; beside the seed model when absent.")
    experts: dict[str, str] = key({}, "Name of each domain to the dense model trained on it, in the order of experts.")
    embedder: str = key(
        SEED,
        "What makes vectors of documents: seed (the seed model's hidden states), a sentence-embedding model (folder or "
        "hub name), or a .safetensors file of vectors by domain.",
    )
    documents: int = key(256, "At most so many documents of a domain are embedded.", low=1)
    same_space_as: str | None = key(None, "Domain file whose centre and statistics are taken over, to add domains.")
    domains: str | None = key(None, "Domain file of `nexus embed`, for method nexus.")
    method: str = key("nexus", "What the experts become: see `moe-dist nexus upcycle --help`.", choices=METHODS)
    router: str = key("prototype", "Router of method nexus.", choices=("prototype", "paper"))
    num_experts: int = key(4, "sparse_upcycling: how many copies of the one expert.", low=1)
    top_k: int | None = key(None, "Experts of a token; 1 for nexus and linear, 2 for the others when absent.", low=1)
    model: str | None = key(None, "extend: the Nexus model (folder or hub name) that gets a new expert.")
    merge: float | None = key(
        None,
        "extend: share of the new model in tensors that are neither MLP nor router; 1/(n+1) when absent.",
        low=0,
        high=1,
    )
    linear_extend: str = key(
        "append", "extend: the new row of a linear router.", choices=("reset", "append", "centroid")
    )
    renorm_new: bool = key(
        False, "extend: a paper router's new row is made as long as the old ones are on average, and stays so."
    )
    init_seed: int = key(0, "Seed of the router's random weights.", low=0)


@dataclass
class NexusConfig:
    data: DataSection = key(DataSection, "The domains' text: data.train, one source a domain.")
    nexus: NexusSection = key(NexusSection, "Seed, experts, embedder and method.")


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> NexusConfig:
    """Read and check the YAML of a Nexus verb. Raises UserError that names the key and what to do."""
    config = load_schema(path, overrides, NexusConfig)
    nexus = config.nexus
    folders = {"seed": nexus.seed, "tokenizer": nexus.tokenizer, "model": nexus.model}
    folders |= {f"experts.{name}": folder for name, folder in nexus.experts.items()}
    if nexus.embedder != SEED and not nexus.embedder.endswith(".safetensors"):
        folders["embedder"] = nexus.embedder
    for name, folder in folders.items():
        if folder is not None and is_local(folder) and not os.path.isdir(os.path.expanduser(folder)):
            raise UserError(f"nexus.{name}={folder}: no such folder")
    return config


def seed_of(config: NexusConfig) -> str:
    """nexus.seed, which every verb but `extend` needs."""
    if config.nexus.seed is None:
        raise UserError("nexus.seed is not set: name the dense model that the experts were trained from")
    return config.nexus.seed
