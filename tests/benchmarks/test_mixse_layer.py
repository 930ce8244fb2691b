"""The contenders of mixse_layer on a small problem, and what generates in self_moe_generation."""

from __future__ import annotations

import pytest
import torch

from benchmarks import mixse_layer
from benchmarks._mixse_peers import Shape
from benchmarks._self_moe_mixture import generate, models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_peer_computes_what_we_compute(dtype):
    """Each comparison raises where a peer's result differs."""
    found = list(mixse_layer.measure(Shape(24, 3, 4, 48), "small", dtype, seconds=0.0, step=True))
    cases = [row["case"].rpartition(", ")[2] for row in found]
    assert cases == ["LoRA part"] * 3 + ["layer"] * 4 + ["router step"] * 3 + ["router step memory"] * 3
    assert all(row["ratio"] > 0 for row in found)


def test_a_wrong_peer_is_noticed():
    right = torch.ones(4, 4)
    mixse_layer.check("a peer", torch.float32, right, right)
    with pytest.raises(RuntimeError, match="a peer differs from ours"):
        mixse_layer.check("a peer", torch.float32, right, right * 1.001)


def test_the_mixture_generates_otherwise_than_its_base():
    base, mixture = models(128, 2, torch.float32)
    prompts_BL = torch.randint(0, base.config.vocab_size, (2, 4))
    ours, theirs = generate(mixture, prompts_BL), generate(base, prompts_BL)
    assert ours.shape == theirs.shape
    assert not torch.equal(ours, theirs)
