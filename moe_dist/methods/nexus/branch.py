"""Branching: a dense expert for each domain, trained from the seed, several at a time where there are ranks for it."""

from __future__ import annotations

from moe_dist.methods.nexus.folders import open_dense
from moe_dist.train.side_by_side.plan import SideBySide
from moe_dist.train.side_by_side.run import train_side_by_side


def branch(branching: SideBySide) -> int:
    """Train and export all experts, or go on with it; see `train_side_by_side`, whose exit codes and errors it has.

    A seed that could not be upcycled later is refused before the first step.
    """
    return train_side_by_side(branching, check=lambda: open_dense("seed", branching.start.model.path))
