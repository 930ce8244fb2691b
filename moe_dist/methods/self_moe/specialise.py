"""Specialising: one LoRA expert for each skill on the same frozen base, several at a time where there are ranks."""

from __future__ import annotations

from moe_dist.parallel.grid import Grid
from moe_dist.train.build import plan_model
from moe_dist.train.side_by_side.plan import SideBySide
from moe_dist.train.side_by_side.run import train_side_by_side


def specialise(specialising: SideBySide) -> int:
    """Train all experts and write their adapters, or go on with it; see `train_side_by_side`, whose exit codes and
    errors it has. A base that LoRA does not fit is refused before the first step."""
    return train_side_by_side(specialising, check=lambda: plan_model(specialising.start, Grid.single()))
