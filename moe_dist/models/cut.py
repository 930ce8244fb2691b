"""Cutting: from a whole model on the meta device to what one rank holds of it, axis by axis.

Names do not change: whatever is left is called as in the whole model, so that loading, checkpoints and exports need
not know how a model was cut.
"""

from __future__ import annotations

from torch import nn

from moe_dist.errors import UserError
from moe_dist.parallel.grid import Grid


def cut(model: nn.Module, grid: Grid) -> None:
    """Keep this rank's pipeline stage and its part of tensor-parallel weights, and make attention exchange heads for
    tokens over the sequence axis. In place; nothing where these axes have size 1.

    Needs sizes and no process groups, so it works for `--dry-run`. Raises UserError where the model does not allow a
    size, saying what would work.
    """
    for name in ("pipeline", "tensor", "sequence"):
        if getattr(grid, name) > 1:
            raise UserError(f"parallel.{name}={getattr(grid, name)}: not available for this model yet")
