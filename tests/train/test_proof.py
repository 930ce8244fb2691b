"""The proof of the trainable table: what it accepts, and what stops a run."""

from __future__ import annotations

import pytest
import torch

from moe_dist.checkpoint.fragments import Fragment
from moe_dist.parallel.grid import Grid
from moe_dist.train.proof import ChangeProof


class Engine:
    """One tensor that trains, `w`, with its moments, and a module with a frozen one."""

    def __init__(self, weight: torch.Tensor):
        self.module = torch.nn.Linear(3, 2)
        self.module.weight.requires_grad_(False)
        self.state = {"weights": weight, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def fragments(self, kind: str):
        return [Fragment("w", 7, 0, self.state[kind])]

    def gathered(self, parameters):
        return torch.no_grad()

    def reach(self, gradient: float) -> None:
        self.state["exp_avg"].fill_(0.1 * gradient)
        self.state["exp_avg_sq"].fill_(0.05 * gradient**2)


def check(engine: Engine, proof: ChangeProof, lr: float = 1e-3) -> list[str]:
    return proof.check(engine, lr=lr, eps=1e-8)


def test_a_frozen_tensor_that_moves_stops_the_run():
    engine = Engine(torch.ones(4))
    proof = ChangeProof(engine, Grid.single())
    assert check(engine, proof) == ["w[7]"]
    with torch.no_grad():
        engine.module.weight[1, 2] += 1e-6
    with pytest.raises(RuntimeError, match="frozen tensors have changed: weight"):
        check(engine, proof)


def test_a_trained_tensor_that_does_not_move_stops_the_run():
    engine = Engine(torch.ones(4))
    proof = ChangeProof(engine, Grid.single())
    engine.reach(1e-4)
    with pytest.raises(RuntimeError, match=r"have not changed: w\[7\]"):
        check(engine, proof)
    engine.state["weights"][0] += 1e-3
    assert check(engine, proof) == []


@pytest.mark.parametrize("lr", [0.0, 1e-9, 1e-7])
def test_a_step_too_small_for_fp32_is_no_fault(lr):
    # The first steps of a long warm-up: 1 − 1e-9 is 1.
    engine = Engine(torch.ones(4))
    proof = ChangeProof(engine, Grid.single())
    engine.reach(1e-4)
    assert check(engine, proof, lr) == []


def test_a_gradient_far_below_epsilon_is_no_fault():
    engine = Engine(torch.ones(4))
    proof = ChangeProof(engine, Grid.single())
    engine.reach(1e-14)
    assert check(engine, proof) == []
