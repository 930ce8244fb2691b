"""The sequence axis: which tokens of a row a rank holds."""

from __future__ import annotations

import torch

from moe_dist.parallel.grid import Grid


def own_block(x_BL: torch.Tensor, grid: Grid) -> torch.Tensor:
    """This sequence rank's block of whole rows, a view `[B,L/s,...]`."""
    return _part(x_BL, grid.sequence_rank, grid.sequence)


def own_slice(x_BL: torch.Tensor, grid: Grid) -> torch.Tensor:
    """This rank's slice of whole rows, a view `[B,L/(s·t),...]`."""
    return _part(x_BL, grid.slice_rank, grid.slices)


def _part(x_BL: torch.Tensor, index: int, parts: int) -> torch.Tensor:
    length, rest = divmod(x_BL.shape[1], parts)
    assert rest == 0, f"rows of {x_BL.shape[1]} tokens cannot be cut into {parts} parts"
    return x_BL.narrow(1, index * length, length)
