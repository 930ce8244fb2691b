"""The configuration of a branching: that of a training run, with one source of text for each domain.

Every domain becomes an expert, and every expert a run of its own, on that source alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike

from moe_dist.config.load import load_schema
from moe_dist.config.schema import RunConfig, key
from moe_dist.train.side_by_side.plan import SideBySide, SideBySideSection, Terms, plan_side_by_side, start_of

TERMS = Terms(section="branch", start="seed", noun="domain", marker="config.json")


@dataclass
class BranchConfig(RunConfig):
    branch: SideBySideSection = key(
        SideBySideSection, "Experts of several domains: how ranks share them, what is special."
    )


def load_branching(path: str | PathLike, overrides: Sequence[str] = ()) -> SideBySide:
    """Read and check the YAML of `moe-dist nexus branch`. Raises UserError that names the key and what to do."""
    tree = asdict(load_schema(path, overrides, BranchConfig))
    section = SideBySideSection(**tree.pop("branch"))
    start = start_of(tree, TERMS, origin=str(path))
    return plan_side_by_side(start, TERMS, {source.name: [asdict(source)] for source in start.data.train}, section)
