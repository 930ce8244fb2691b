"""How often a layer makes the host wait for the GPU: once, for the counts of a forward."""

from __future__ import annotations

import warnings

import pytest
import torch

from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import contiguous
from moe_dist.ops import permute, unpermute
from moe_dist.parallel.grid import Grid


class Waits:
    """Counts what waits for the GPU in its block."""

    def __enter__(self):
        self._warnings = warnings.catch_warnings(record=True)
        self._seen = self._warnings.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(*error)
        self.found = [f"{w.filename}:{w.lineno}" for w in self._seen if "called a synchronizing" in str(w.message)]


def test_the_counter_counts():
    number = torch.ones(1, device="cuda")
    with Waits() as waits:
        number.item()
        number.tolist()
    assert len(waits.found) == 2


def test_permute_with_a_known_number_of_rows_never_waits():
    ids_TK = torch.rand(64, 8, device="cuda").argsort(1)[:, :2]
    x_TH, probs_TK = torch.randn(64, 32, device="cuda", requires_grad=True), torch.rand(64, 2, device="cuda")
    with Waits() as waits:
        rows_NH, plan = permute(x_TH, ids_TK, num_experts=8, num_rows=128)
        unpermute(rows_NH, plan, probs_TK).sum().backward()
    assert waits.found == []


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("trainable", [None, (0, 2, 5)], ids=["all train", "some train"])
def test_a_layer_waits_once(trainable, recompute):
    experts = 8
    placement = contiguous(experts, ranks=1) if trainable is None else contiguous(experts, ranks=1, trainable=trainable)
    layer = MoEExperts(ExpertSpec(experts, 64, 32), placement, Grid.single("cuda"), dtype=torch.bfloat16, device="cuda")
    layer.recompute = recompute
    x_TH = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    probs_TK = torch.rand(128, 2, device="cuda", requires_grad=True)
    ids_TK = torch.rand(128, experts, device="cuda").argsort(1)[:, :2]
    grad_TH = torch.randn_like(x_TH)
    layer(x_TH, ids_TK, probs_TK).backward(grad_TH)  # libraries load and memory is allocated
    with Waits() as forward:
        y_TH = layer(x_TH, ids_TK, probs_TK)
    assert len(forward.found) <= 1, forward.found
    with Waits() as backward:
        y_TH.backward(grad_TH)
    assert backward.found == []
