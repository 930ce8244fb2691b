"""The receipt of composing: what went into the folder, with fingerprints, and how many parameters each part has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from moe_dist.checkpoint import fingerprint
from moe_dist.methods.self_moe.composition.config import MERGES, MIXTURES, ComposeSection
from moe_dist.methods.self_moe.composition.merging import settings_of
from moe_dist.models.adapter import LoraAdapter
from moe_dist.models.folder import open_weights
from moe_dist.models.skeleton import read_config

RECEIPT = "compose_receipt.json"


@dataclass(frozen=True)
class ComposeReceipt:
    """base: folder, fingerprint and parameters. experts: name, folder, fingerprint, rank, alpha, layers and parameters
    of each. router: its parameters and what it reads, None for a merge. settings: what else decides the result."""

    method: str
    base: dict
    experts: list[dict]
    router: dict | None
    settings: dict

    def to_dict(self) -> dict:
        return asdict(self)

    def render(self) -> str:
        """For people, with every part's share of the base."""
        whole = self.base["parameters"]
        lines = [f"{self.method}: {len(self.experts)} expert(s) over {self.base['folder']}  {self.base['fingerprint']}"]
        for expert in self.experts:
            share = 100 * expert["parameters"] / whole
            lines.append(
                f"  {expert['name']:<16} rank {expert['rank']}, alpha {expert['alpha']:g}, {expert['layers']} layers, "
                f"{expert['parameters']:,} parameters ({share:.2f} % of the base)  {expert['folder']}"
            )
        if self.router is not None:
            lines.append(
                f"  {'router':<16} {self.router['parameters']:,} parameters, reads {self.router['reads']}, "
                f"routing {self.router['routing']}, top {self.router['top_k']} of {len(self.experts)}"
            )
        added = sum(expert["parameters"] for expert in self.experts) + (self.router or {}).get("parameters", 0)
        if self.method in MIXTURES:
            lines.append(f"  {'in all':<16} {added:,} parameters over the base ({100 * added / whole:.2f} %)")
        lines += [f"  {name:<16} {value}" for name, value in self.settings.items()]
        return "\n".join(lines)


def account(section: ComposeSection, base: Path, known: str, experts: Mapping[str, LoraAdapter]) -> ComposeReceipt:
    """The receipt of `section` over the model in `base`, whose fingerprint is `known`. Reads headers only."""
    parts = [
        {
            "name": name,
            "folder": str(adapter.folder),
            "fingerprint": fingerprint(adapter.folder),
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "layers": len(adapter.targets),
            "parameters": sum(prod(info.shape) for info in adapter.files.tensors.values()),
        }
        for name, adapter in experts.items()
    ]
    whole = sum(prod(info.shape) for info in open_weights(base).tensors.values())
    router, settings = None, {}
    if section.method in MERGES:
        if section.method != "instance":
            settings = settings_of(section, experts=len(parts))
    else:
        hidden = read_config(base).get_text_config().hidden_size
        router = {
            "parameters": len(parts) * (hidden + section.bias),
            "reads": section.router_input,
            "routing": section.method if section.method in ("uniform", "random") else "learned",
            "top_k": len(parts) if section.method == "uniform" else section.top_k,
            "seed": section.seed,
        }
    return ComposeReceipt(
        section.method, {"folder": str(base), "fingerprint": known, "parameters": whole}, parts, router, settings
    )
