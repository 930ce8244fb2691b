"""AdamW's groups, and fp32 masters of bf16 parameters."""

from __future__ import annotations

import torch
from torch import nn

from moe_dist.parallel.grid import Grid
from moe_dist.train.optim import MasterAdamW, parameter_groups
from tests.train import toy


def test_only_matrices_decay_and_stacked_biases_are_no_matrices():
    model = toy.parallel_model(toy.full_weights(), Grid.single(), [[0, 1], []])
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1)
    found = {
        (group["family"], group["weight_decay"]): {names[parameter] for parameter in group["params"]}
        for group in groups
    }
    assert found["expert", 0.1] == {f"layers.0.experts.trainable.{name}" for name in ("gate_up_proj", "down_proj")}
    assert found["expert", 0.0] == {
        f"layers.0.experts.trainable.{name}" for name in ("gate_up_proj_bias", "down_proj_bias")
    }
    assert {"embed.weight", "head.weight", "layers.0.router.weight"} <= found["dense", 0.1]
    assert {"head.bias", "layers.1.norm.weight", "layers.1.norm.bias"} <= found["dense", 0.0]
    trained = {names[parameter] for parameter in names if parameter.requires_grad}
    assert set().union(*found.values()) == trained


def test_empty_groups_are_left_out():
    model = toy.parallel_model(toy.full_weights(), Grid.single(), [[], []])
    assert [group["family"] for group in parameter_groups(model, weight_decay=0.1)] == ["dense", "dense"]


def test_fp32_parameters_are_their_own_masters():
    torch.manual_seed(0)
    ours, reference = nn.Linear(5, 3), nn.Linear(5, 3)
    reference.load_state_dict(ours.state_dict())
    hyper = {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.1}
    optimizer = MasterAdamW([{"params": list(ours.parameters())}], **hyper)
    expected = torch.optim.AdamW(reference.parameters(), **hyper)
    for _ in range(3):
        x = torch.randn(4, 5)
        for model, stepped in ((ours, optimizer), (reference, expected)):
            model(x).square().sum().backward()
            stepped.step()
            stepped.zero_grad()
    assert torch.equal(ours.weight, reference.weight)
    assert torch.equal(ours.bias, reference.bias)


def test_bf16_gradients_add_up_in_fp32_and_masters_keep_what_bf16_cannot():
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([{"params": [parameter]}], lr=1e-4, eps=1e-6, weight_decay=0.0)
    master = optimizer.masters[parameter]
    (parameter * 256).sum().backward()
    (parameter * 1).sum().backward()
    assert parameter.grad is None
    assert master.grad.item() == 257.0  # bf16 has no 257
    for _ in range(3):
        optimizer.step()
        (parameter * 1).sum().backward()
    assert master.item() != 1.0
    assert parameter.item() == 1.0  # the steps are below bf16's spacing, and not lost
    optimizer.close()
    parameter.sum().backward()
    assert parameter.grad is not None
