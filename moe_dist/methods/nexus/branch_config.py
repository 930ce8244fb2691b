"""The configuration of a branching: that of a training run, with one source of text for each domain.

Every domain becomes an expert, and every expert a run of its own, on that source alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

from moe_dist.config.checks import check_layout, check_paths
from moe_dist.config.load import build, load_schema
from moe_dist.config.schema import RunConfig, key
from moe_dist.errors import UserError
from moe_dist.methods.nexus.branch_report import REPORT
from moe_dist.train.worlds import group_count

RUNS = "runs"


@dataclass
class BranchSection:
    groups: int | None = key(
        None, "Groups of ranks that train experts side by side; as many as fit ranks and experts when absent.", low=1
    )
    overrides: dict[str, list[str]] = key({}, "Name of a domain to key=value overrides for its expert alone.")


@dataclass
class BranchConfig(RunConfig):
    branch: BranchSection = key(BranchSection, "Experts of several domains: how ranks share them, what is special.")


@dataclass(frozen=True)
class Branching:
    """What `branch` does. seed: the configuration without what belongs to one expert; experts: domain -> its run."""

    seed: RunConfig
    experts: dict[str, RunConfig]
    groups: int | None

    @property
    def out(self) -> Path:
        return Path(self.seed.run.dir)

    def deal(self, ranks: int) -> list[list[str]]:
        """The experts of each group of that many ranks, in the order in which it trains them.

        Raises UserError where the ranks cannot be cut so, or an expert's layout does not fit a group.
        """
        count = group_count(ranks, most=len(self.experts), asked=self.groups)
        for name, config in self.experts.items():
            try:
                check_layout(config, ranks // count)
            except UserError as error:
                raise UserError(f"expert {name}, in a group of {ranks // count} of {ranks} ranks: {error}") from None
        names = list(self.experts)
        return [names[group::count] for group in range(count)]


def load_branching(path: str | PathLike, overrides: Sequence[str] = ()) -> Branching:
    """Read and check the YAML of `moe-dist nexus branch`. Raises UserError that names the key and what to do."""
    tree = asdict(load_schema(path, overrides, BranchConfig))
    section = BranchSection(**tree.pop("branch"))
    name = re.sub(r"[^A-Za-z0-9._+=-]", "-", Path(path).stem)
    seed = build(tree, origin=str(path), name=name)
    if seed.model.path is None:
        raise UserError("model.path is not set: name the seed, the dense model from which the experts are trained")
    domains = [source.name for source in seed.data.train]
    if not domains:
        raise UserError("data.train is empty: give one source for each domain, under the domain's name")
    strange = next((name for name in section.overrides if name not in domains), None)
    if strange is not None:
        raise UserError(f"branch.overrides.{strange}: no such domain; data.train has {', '.join(domains)}")
    experts = {}
    for name, source in zip(domains, asdict(seed)["data"]["train"], strict=True):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", name) or name in (RUNS, REPORT):
            raise UserError(
                f"data.train: a domain cannot be called {name!r}, since its expert becomes a folder of that name: use "
                f"letters, digits and ._+=- (and neither {RUNS} nor {REPORT})"
            )
        own = asdict(seed)
        own["data"]["train"] = [source]
        own["run"] |= {"name": name, "dir": str(Path(seed.run.dir) / RUNS / name)}
        experts[name] = build(own, section.overrides.get(name, ()), origin=f"branch.overrides.{name}")
        _check_expert(name, experts[name], seed)
    return Branching(seed, experts, section.groups)


def _check_expert(name: str, config: RunConfig, seed: RunConfig) -> None:
    check_paths(config)
    if not config.checkpoint.save_last:
        raise UserError("checkpoint.save_last=false: an expert's model is made of its last checkpoint; set it to true")
    if config.train.stop_at is not None:
        raise UserError(f"train.stop_at={config.train.stop_at}: experts are trained to the end; set train.steps")
    for place, given, wanted in (
        ("model.path", config.model.path, seed.model.path),
        ("run.dir", config.run.dir, str(Path(seed.run.dir) / RUNS / name)),
    ):
        if given != wanted:
            raise UserError(f"branch.overrides.{name}: {place} is the same for all experts; remove it")
