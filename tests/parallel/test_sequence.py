"""Heads for tokens and back, against slices of one tensor that every rank can make."""

import pytest
import torch

from moe_dist.parallel.grid import build_grid
from moe_dist.parallel.sequence import heads_of_tokens, tokens_of_heads
from moe_dist.parallel.traffic import count_traffic

ROWS, LENGTH = 2, 12
SHAPES = [(4, 3), (8, 3), (4, 5)]  # heads and their size: queries, keys, values


def whole(index: int) -> torch.Tensor:
    heads, size = SHAPES[index]
    return torch.randn(ROWS, heads, LENGTH, size, generator=torch.Generator().manual_seed(index))


def part(x: torch.Tensor, dim: int, rank: int, parts: int) -> torch.Tensor:
    return x.chunk(parts, dim)[rank]


def there_and_back(sequence: int) -> dict:
    grid = build_grid(sequence=sequence)
    group, rank = grid.sequence_group, grid.sequence_rank
    mine = [part(whole(index), 2, rank, sequence).clone().requires_grad_() for index in range(3)]
    with count_traffic() as traffic:
        got = tokens_of_heads(mine, group)
    there = [torch.equal(x, part(whole(index), 1, rank, sequence)) for index, x in enumerate(got)]
    back = [heads_of_tokens(x.transpose(1, 2), group).transpose(1, 2) for x in got]
    # A weight for every element of the whole: the gradient that comes home is that of this rank's own elements.
    loss = sum((x * part(whole(index).sin(), 1, rank, sequence)).sum() for index, x in enumerate(got))
    loss.backward()
    return {
        "there": there,
        "back": [torch.equal(x, y) for x, y in zip(back, mine, strict=True)],
        "gradients": [torch.equal(x.grad, part(whole(i).sin(), 2, rank, sequence)) for i, x in enumerate(mine)],
        "bytes": traffic.bytes("sequence"),
        "exchanges": len(traffic.exchanges),
    }


@pytest.mark.parametrize("sequence", [2, 4])
def test_heads_are_exchanged_for_tokens(ranks, sequence):
    values = ROWS * LENGTH // sequence * sum(heads * size for heads, size in SHAPES)
    for result in ranks(4, there_and_back, sequence):
        assert all(result["there"] + result["back"] + result["gradients"])
        assert result["exchanges"] == 1
        assert result["bytes"] == 4 * values * (sequence - 1) // sequence
