"""Which experts are trained side by side: a run of its own for each, all from the same model.

The configuration is that of a training run, with one source of text for each expert, and a section of the verb's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.config.checks import check_layout, check_paths
from moe_dist.config.load import build
from moe_dist.config.schema import RunConfig, key
from moe_dist.errors import UserError
from moe_dist.train.worlds import group_count

RUNS = "runs"


@dataclass
class SideBySideSection:
    groups: int | None = key(
        None, "Groups of ranks that train experts side by side; as many as fit ranks and experts when absent.", low=1
    )
    overrides: dict[str, list[str]] = key({}, "Name of an expert to key=value overrides for it alone.")


@dataclass(frozen=True)
class Terms:
    """What a verb calls its things.

    section: its own section of the configuration, and the table of losses is SECTION.json. start: the model that all
    experts start from. noun: what there is an expert for. marker: a file that a finished expert's folder holds.
    """

    section: str
    start: str
    noun: str
    marker: str


@dataclass(frozen=True)
class SideBySide:
    """start: the configuration without what belongs to one expert; experts: name -> its run."""

    terms: Terms
    start: RunConfig
    experts: dict[str, RunConfig] = field(default_factory=dict)
    groups: int | None = None

    @property
    def out(self) -> Path:
        return Path(self.start.run.dir)

    @property
    def report(self) -> Path:
        """The table of held-out losses."""
        return self.out / f"{self.terms.section}.json"

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


def start_of(tree: dict[str, Any], terms: Terms, *, origin: str) -> RunConfig:
    """The configuration that all experts share, checked; its training sources are those of all experts."""
    name = re.sub(r"[^A-Za-z0-9._+=-]", "-", Path(origin).stem)
    start = build(tree, origin=origin, name=name)
    if start.model.path is None:
        raise UserError(f"model.path is not set: name the {terms.start}, from which the experts are trained")
    if not start.data.train:
        raise UserError(f"data.train is empty: give one source for each {terms.noun}, under the {terms.noun}'s name")
    return start


def plan_side_by_side(
    start: RunConfig, terms: Terms, sources: Mapping[str, Sequence[dict]], section: SideBySideSection
) -> SideBySide:
    """A run for each expert. sources: name of the expert -> the sources that it is trained on, as plain values.

    Raises UserError for names that cannot be folders, and for what overrides may not change.
    """
    strange = next((name for name in section.overrides if name not in sources), None)
    if strange is not None:
        raise UserError(f"{terms.section}.overrides.{strange}: no such {terms.noun}; there is {', '.join(sources)}")
    plan = SideBySide(terms, start, groups=section.groups)
    for name, own_sources in sources.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", name) or name in (RUNS, plan.report.name):
            raise UserError(
                f"data.train: a {terms.noun} cannot be called {name!r}, since its expert is a folder of that name: "
                f"use letters, digits and ._+=- (and neither {RUNS} nor {plan.report.name})"
            )
        own = asdict(start)
        own["data"]["train"] = list(own_sources)
        own["run"] |= {"name": name, "dir": str(plan.out / RUNS / name)}
        overrides = section.overrides.get(name, ())
        plan.experts[name] = build(own, overrides, origin=f"{terms.section}.overrides.{name}")
        _check_expert(name, plan)
    return plan


def _check_expert(name: str, plan: SideBySide) -> None:
    config, start = plan.experts[name], plan.start
    check_paths(config)
    if not config.checkpoint.save_last:
        raise UserError("checkpoint.save_last=false: an expert's model is made of its last checkpoint; set it to true")
    if config.train.stop_at is not None:
        raise UserError(f"train.stop_at={config.train.stop_at}: experts are trained to the end; set train.steps")
    for place, given, wanted in (
        ("model.path", config.model.path, start.model.path),
        ("run.dir", config.run.dir, str(plan.out / RUNS / name)),
    ):
        if given != wanted:
            where = f"{plan.terms.section}.overrides.{name}"
            raise UserError(f"{where}: {place} is the same for all experts; remove it")
