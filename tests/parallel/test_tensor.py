"""The tensor axis' exchanges: what they give, what flows back, and what they send."""

from __future__ import annotations

import pytest
import torch

from moe_dist.parallel import traffic
from moe_dist.parallel.grid import build_grid, layout
from moe_dist.parallel.shard import Shard, cut_parameter, shard_of
from moe_dist.parallel.tensor import gather_tokens, scatter_sum

SHAPES = [(2, 3, 5), (1, 4, 2), (6, 3)]  # [B,S,H], one row, tokens without rows


def _inputs(shape, world, scale):
    generator = torch.Generator().manual_seed(7)
    tokens = [*shape[:-2], shape[-2] * scale, shape[-1]]
    return [torch.randn(tokens, generator=generator, dtype=torch.float64) for _ in range(world)]


def _gathers(shape):
    """Against one process that has all slices; the gradient of rank r's y is y_r times r + 1."""
    grid = build_grid(tensor=2)
    slices = _inputs(shape, grid.world, 1)
    x = slices[grid.rank].clone().requires_grad_()
    with traffic.count_traffic() as counted:
        y = gather_tokens(x, grid)
        ((grid.rank + 1) * y.square().sum()).backward()
    assert torch.equal(y, torch.cat(slices, dim=-2))
    torch.testing.assert_close(x.grad, 2 * x.detach() * sum(r + 1 for r in range(grid.world)), rtol=1e-15, atol=0)
    others = grid.tensor - 1
    assert counted.bytes("tensor gather") == counted.bytes("tensor scatter") == others * x.nbytes
    assert counted.bytes() == 2 * others * x.nbytes


def _scatters(shape):
    grid = build_grid(tensor=2)
    partial = _inputs(shape, grid.world, grid.tensor)
    x = partial[grid.rank].clone().requires_grad_()
    y = scatter_sum(x, grid)
    (y * (grid.rank + 1)).sum().backward()
    whole = sum(partial)
    assert torch.equal(y, whole.chunk(grid.tensor, dim=-2)[grid.tensor_rank])
    for rank, part in enumerate(x.grad.chunk(grid.tensor, dim=-2)):
        assert (part == rank + 1).all()


def _other_ranks_of_the_world():
    """On 4 ranks: the groups are {0,1} and {2,3}, and each gathers its own."""
    grid = build_grid(tensor=2)
    y = gather_tokens(torch.full((1, 1, 1), float(grid.rank)), grid)
    return y.flatten().tolist()


def _no_half_sums():
    """bf16: 256 + 1 + 1 is 258, where 256 + 1 rounded on the way is 256 again."""
    grid = build_grid(tensor=4)
    x = torch.full((1, 4, 1), [256.0, 1.0, 1.0, 0.0][grid.rank], dtype=torch.bfloat16)
    return scatter_sum(x, grid).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_gather_and_its_gradient(ranks, shape):
    ranks(2, _gathers, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_scatter_and_its_gradient(ranks, shape):
    ranks(2, _scatters, shape)


def test_groups_and_rounding(ranks):
    assert ranks(4, _other_ranks_of_the_world) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert ranks(4, _no_half_sums) == [258.0] * 4


def test_shapes_without_groups():
    grid = layout(8, tensor=4)
    x = torch.empty(2, 3, 5, device="meta", requires_grad=True)
    y = gather_tokens(x, grid)
    assert y.shape == (2, 12, 5)
    z = scatter_sum(y, grid)
    assert z.shape == x.shape
    z.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dim", [0, 1])
def test_shards(dim):
    whole = torch.nn.Parameter(torch.arange(24.0).view(4, 6), requires_grad=dim == 0)
    parts = [cut_parameter(whole, Shard(dim, part, 2)) for part in range(2)]
    assert torch.equal(torch.cat(parts, dim), whole)
    assert [shard_of(part).part for part in parts] == [0, 1]
    assert all(part.requires_grad == whole.requires_grad for part in parts)
    assert shard_of(whole) is None
    assert parts[1].shard.whole_shape(parts[1].shape) == whole.shape
    with torch.no_grad():
        parts[0].zero_()
    assert whole.sum() == 276  # the part has memory of its own
