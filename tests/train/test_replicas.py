"""One bit that differs between ranks that should hold the same, on every axis."""

from __future__ import annotations

import pytest
import torch

from moe_dist.config.load import build as build_config
from moe_dist.errors import PolicyStop
from moe_dist.train.replicas import check_replicas
from tests.train.axes import Case, build

CONFIG = {"run": {"name": "r"}, "model": {"path": "m"}, "data": {"train": "t"}}


def flipped(case: Case, name: str | None, ranks: tuple[int, ...]) -> str:
    """What the check says on this rank, where these ranks' parameter of that name has one bit turned."""
    engine = build(case)
    grid, config = engine.grid, build_config(CONFIG)
    if grid.rank in ranks:
        bits = engine.module.get_parameter(name).data.view(torch.int32)
        bits.view(-1)[3] ^= 1 << 9
    try:
        check_replicas(engine.module, config, grid, step=7)
    except PolicyStop as stop:
        return str(stop)
    finally:
        engine.close()
    return ""


@pytest.mark.parametrize(
    ("case", "name", "odd", "found"),
    [
        (Case(t=2, stage=0), "layers.0.mlp.down.weight", (3,), "layers.0.mlp.down.weight: rank 3"),
        (Case(p=2, e=2, stage=1), "layers.1.norm.weight", (3,), "layers.1.norm.weight: rank 3"),
        (Case(t=2, e=4, stage=2), "layers.1.mlp.up.bias", (2,), "layers.1.mlp.up.bias: rank 2"),
        # Both ranks of the last stage: only the first stage can tell.
        (Case(p=2, tied=True, stage=0), "head.weight", (2, 3), "embed.weight and its copy head.weight: rank"),
    ],
)
def test_a_bit_is_found_among_the_ranks_that_hold_the_same(ranks, case, name, odd, found):
    assert set(ranks(4, flipped, case, None, ())) == {""}
    texts = ranks(4, flipped, case, name, odd)
    assert len(set(texts)) == 1
    assert found in texts[0]
    assert "step 7" in texts[0]
