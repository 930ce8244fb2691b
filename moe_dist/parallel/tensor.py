"""The two exchanges of the tensor axis, with their gradients: each is the other's backward.

A tensor group's ranks hold consecutive slices of the same tokens. At the entrance of a block whose weights are cut they
gather them, `x_BSH` -> `x_BMH` with M = S · group; what then comes out of the block is a partial sum on each rank, and
the exit adds these up, each rank the ones of its slice, `[B,M,H]` -> `[B,S,H]` (Megatron's sequence parallelism,
arXiv 2205.05198, section 4.2.2).

With y = gather(x), rank r's x enters the y of all ranks at slice r, so dx is the sum over ranks of that slice of their
dy: the scatter. With y = scatter(x), every rank's x enters the y of rank r by its slice r, so dx is all slices of dy
side by side: the gather. No factor belongs to either.

On the meta device nothing travels, and no group is needed: shapes alone, for whoever plans.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from moe_dist.parallel.collectives import exchange, gather
from moe_dist.parallel.grid import Grid

TOKENS = -2  # the dimension of the tokens in `[...,tokens,H]`


def gather_tokens(x_BSH: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The slices of all ranks of the tensor group side by side, `[...,S,H]` -> `[...,M,H]`; with gradient."""
    return _Gather.apply(x_BSH, grid.tensor, grid.tensor_group)


def scatter_sum(partial_BMH: torch.Tensor, grid: Grid) -> torch.Tensor:
    """This rank's slice of the sum over the tensor group, `[...,M,H]` -> `[...,S,H]`; with gradient."""
    return _ScatterSum.apply(partial_BMH, grid.tensor, grid.tensor_group)


def own_ids(ids: torch.Tensor, part: int, size: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of token ids of a vocabulary of `parts` parts of `size`: their places in part `part`, and which lie in another.

    Those have place 0. An id of no part keeps a place outside, so that a lookup with it fails as it does uncut.
    """
    places = ids - part * size
    elsewhere = ((places < 0) | (places >= size)) & (ids >= 0) & (ids < parts * size)
    return places.masked_fill(elsewhere, 0), elsewhere


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, group):
        ctx.where = size, group
        return _gathered(x, size, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _summed(grad, *ctx.where), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, group):
        ctx.where = size, group
        return _summed(x, size, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _gathered(grad, *ctx.where), None, None


def _gathered(x: torch.Tensor, size: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    *outer, tokens, hidden = x.shape
    if x.is_meta:
        return x.new_empty(*outer, size * tokens, hidden)
    assert group is not None, "a grid of numbers alone has nobody to exchange tokens with"
    parts = gather(x, group, what="tensor gather")  # [size,...,S,H]
    return parts.movedim(0, TOKENS - 1).reshape(*outer, size * tokens, hidden)


def _summed(x: torch.Tensor, size: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Each rank's slices to the ranks that hold them, and there one sum in float32, in rank order: rounded once, and
    the same bits whatever the backend, which a ring that adds up on its way does not promise."""
    *outer, tokens, hidden = x.shape
    assert tokens % size == 0, f"{tokens} tokens over {size} ranks"
    if x.is_meta:
        return x.new_empty(*outer, tokens // size, hidden)
    assert group is not None, "a grid of numbers alone has nobody to exchange tokens with"
    slices = x.reshape(*outer, size, tokens // size, hidden).movedim(TOKENS - 1, 0).contiguous()  # [size,...,S,H]
    parts = exchange(slices, [1] * size, [1] * size, group, what="tensor scatter")
    total = parts[0].to(torch.promote_types(x.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(x.dtype)
