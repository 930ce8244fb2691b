"""The sequence axis: which tokens of a row a rank holds, and how its ranks exchange heads for tokens (Ulysses).

Attention needs all tokens, but each of its heads by itself. So the ranks of a sequence group, which hold M = L/s tokens
of all h heads, come to hold all L tokens of h/s heads each, and go back after attention (arXiv:2309.14509).
A rank sends (s-1)/s of what it holds, whatever s is: the volume per rank falls as 1/s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from moe_dist.parallel.collectives import exchange
from moe_dist.parallel.grid import Grid

WHAT = "sequence"  # the name of these exchanges where they are counted


def own_block(x_BL: torch.Tensor, grid: Grid) -> torch.Tensor:
    """This sequence rank's block of whole rows, a view `[B,L/s,...]`."""
    return _part(x_BL, grid.sequence_rank, grid.sequence)


def own_slice(x_BL: torch.Tensor, grid: Grid) -> torch.Tensor:
    """This rank's slice of whole rows, a view `[B,L/(s·t),...]`."""
    return _part(x_BL, grid.slice_rank, grid.slices)


def tokens_of_heads(states: Sequence[torch.Tensor], group: dist.ProcessGroup) -> tuple[torch.Tensor, ...]:
    """Each of `states` `[B,h,M,D]`, this rank's tokens of all heads, to `[B,h/s,L,D]`, all tokens of this rank's heads.

    One exchange for all of them, with gradient. h and D may differ, h has to be divisible by the size s of the group;
    one dtype. Rank r gets the r-th run of consecutive heads; tokens come in rank order. Collective over `group`.
    """
    return _Exchange.apply(group, 1, 2, *states)


def heads_of_tokens(out_BLhD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The way back, in the order in which attention gives its output: `[B,L,h/s,D]` to `[B,M,h,D]`. Collective."""
    return _Exchange.apply(group, 1, 2, out_BLhD)[0]


class _Exchange(torch.autograd.Function):
    """Every tensor is cut along dimension `cut` into a part for each rank, and the parts that came are joined along
    dimension `join`. The gradient goes the same way with the two exchanged."""

    @staticmethod
    def forward(ctx, group, cut, join, *tensors):
        ctx.group, ctx.cut, ctx.join = group, cut, join
        return _exchanged(tensors, group, cut, join)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return None, None, None, *_exchanged(grads, ctx.group, ctx.join, ctx.cut)


def _exchanged(tensors: Sequence[torch.Tensor], group, cut: int, join: int) -> tuple[torch.Tensor, ...]:
    size = dist.get_world_size(group)
    parts = [tensor.unflatten(cut, (size, -1)).movedim(cut, 0) for tensor in tensors]
    rows_SN = torch.cat([part.flatten(1) for part in parts], dim=1)
    came_SN = exchange(rows_SN, [1] * size, [1] * size, group, what=WHAT)
    came = came_SN.split([part[0].numel() for part in parts], dim=1)
    return tuple(
        part_SN.view(part.shape).movedim(0, join).flatten(join, join + 1)
        for part_SN, part in zip(came, parts, strict=True)
    )


def _part(x_BL: torch.Tensor, index: int, parts: int) -> torch.Tensor:
    length, rest = divmod(x_BL.shape[1], parts)
    assert rest == 0, f"rows of {x_BL.shape[1]} tokens cannot be cut into {parts} parts"
    return x_BL.narrow(1, index * length, length)
