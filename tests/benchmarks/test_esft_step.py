"""The arms of esft_step on a small model, and what it measures with."""

from __future__ import annotations

import pytest
import torch

from benchmarks import _measure, esft_step
from benchmarks._esft_arms import Task
from moe_dist.config.expert_files import ExpertConfig
from moe_dist.ops import memory, native


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    ids_LTK = torch.stack([torch.randperm(64)[:6] for _ in range(2 * 32)]).view(2, 32, 6)
    chosen = ExpertConfig({"1": ids_LTK[0, 0, :3].tolist(), "2": ids_LTK[1, 0, :2].tolist()})
    return Task(32, chosen, ids_LTK, torch.randint(0, 3200, (2, 16)))


def test_every_arm_computes_the_same_and_bytes_are_exact(task):
    """Losses and gradients of the selected experts are compared on the way: a difference raises."""
    rows = {(row["case"], row["peer_name"]): row for row in esft_step.whole_model(task, rounds=1)}
    per_expert = 3 * 64 * 44
    selected = 5 * per_expert
    for what, size in (("gradient", 4), ("optimizer", 12)):
        found = rows[f"{what} bytes", "gradient masking"]
        assert found["ours"] == pytest.approx(size * selected / 1e6, abs=1e-4)
        assert found["peer"] == pytest.approx(size * 128 * per_expert / 1e6, abs=1e-4)
        exact = rows[f"{what} bytes", f"goal: exactly {size} x {selected:,} selected parameters"]
        assert exact["ours"] == exact["peer"] == size * selected
    products = {peer: row["peer"] / row["ours"] for (case, peer), row in rows.items() if case == "products counted"}
    assert products["full fine-tuning"] > products["gradient masking"] > 1


def test_experts_alone_compute_the_same():
    rows = list(esft_step.experts_alone(hidden=32, width=16, rows=128, seconds=0.0, rounds=1))
    assert len(rows) == 10
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.skipif(not native.has_cpu(), reason="the native library was not built here")
@pytest.mark.parametrize("below", [True, False])
def test_operations_of_frozen_and_trainable_products(below):
    """Per row and I·H: 6 forward, 6 for the rows' gradient (2 of them for that of the activation), 6 for weights."""
    ours, masked = esft_step._expert_contenders(32, 16, 128, torch.float32)
    of_a_row = 16 * 32
    trained, rows = 16, 128
    expected = 6 * rows + (6 * rows + 6 * trained if below else 8 * trained)
    assert _measure.flops(lambda: ours(below)) == of_a_row * expected
    assert _measure.flops(lambda: masked(below)) == of_a_row * rows * (18 if below else 14)


def test_allocated_bytes():
    x = torch.ones(1 << 16, requires_grad=True)  # 256 KiB

    def step():
        ((x * 2) * 3).sum().backward()

    peak, left = _measure.allocated(step)
    assert left == 1 << 18  # x.grad
    assert 2 << 18 <= peak < 3 << 18  # 2x beside 6x, and scalars


def test_allocated_bytes_of_our_own_memory_count_too():
    x = torch.ones(4)
    peak, left = _measure.allocated(lambda: memory.empty(x, 1 << 20).zero_())
    assert (peak, left) == (1 << 22, 0)
