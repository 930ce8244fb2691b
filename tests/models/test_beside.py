"""Shared experts that compute while tokens travel: the same numbers, computed once, in the experts layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_dist.models import load_model, moe_layers
from moe_dist.models.beside import compute_shared_experts_beside
from moe_dist.parallel.grid import build_grid
from tests.models.tiny import batch


def outcome(folder: Path, overlap: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int, int]:
    """On each rank: logits, gradients, how often a shared expert ran, and how often inside the experts layer."""
    grid = build_grid(expert=torch.distributed.get_world_size())
    model = load_model(folder, grid)
    assert compute_shared_experts_beside(model) == 1 if overlap else True
    runs = []
    for _, layer in moe_layers(model):
        if layer.beside is not None:
            layer.beside = lambda run=layer.beside: runs.append("in the layer") or run()
    shared = next(module for name, module in model.named_modules() if name.endswith("shared_experts"))
    shared.down_proj.register_forward_hook(lambda *_: runs.append("shared"))
    logits = model(input_ids=batch(seed=grid.rank)).logits
    logits.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return logits.detach(), grads, runs.count("shared"), runs.count("in the layer")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_the_same_numbers(ranks, tiny, family, world):
    folder = tiny(family)
    for plain, beside in zip(*(ranks(world, outcome, folder, overlap) for overlap in (False, True)), strict=True):
        assert (plain[2:], beside[2:]) == ((1, 0), (1, 1))
        torch.testing.assert_close(beside[0], plain[0], rtol=1e-6, atol=1e-6)
        assert beside[1].keys() == plain[1].keys()
        assert any("shared_experts" in name for name in beside[1])
        for name, gradient in plain[1].items():
            torch.testing.assert_close(beside[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
