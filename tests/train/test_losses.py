"""The loss as a sum over label tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_dist.parallel import traffic
from moe_dist.parallel.grid import build_grid
from moe_dist.train import losses
from moe_dist.train.losses import IGNORE, count_labels, label_loss_sum, next_labels, target_loss_sum


def test_equals_transformers_loss_times_its_tokens():
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    logits = torch.randn(3, 7, 11)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :4] = IGNORE
    labels[2] = IGNORE
    mean = ForCausalLMLoss(logits, labels, vocab_size=11)
    assert count_labels(labels) == 3 - 1 + 1 + 6
    torch.testing.assert_close(label_loss_sum(logits, labels), mean * count_labels(labels), rtol=1e-6, atol=0)


def test_no_label_gives_an_exact_zero_with_zero_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = label_loss_sum(logits, torch.full((2, 3), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_bf16_logits_are_summed_in_float32():
    logits = torch.randn(4, 65, 50, dtype=torch.bfloat16)
    labels = torch.randint(0, 50, (4, 65))
    loss = label_loss_sum(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), label_loss_sum(logits.double(), labels).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("block", [1, 40, 1 << 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_equals_torchs_whatever_the_block(monkeypatch, dtype, block):
    """Blocks of one row, of some with a rest, and all at once; rows that are ignored may hold anything."""
    monkeypatch.setattr(losses, "_BLOCK", block)
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 9, 11)).to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    labels = torch.randint(0, 11, (2, 9))
    labels[0, 3:6] = IGNORE
    with torch.no_grad():
        logits[0, 3] = float("inf")
    before = logits.detach().clone()
    loss = label_loss_sum(logits, labels)
    (0.37 * loss).backward()
    assert torch.equal(logits, before)
    expected = F.cross_entropy(wide.flatten(0, 1), next_labels(labels).flatten(), ignore_index=IGNORE, reduction="sum")
    (0.37 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    rounding = {torch.float32: 1e-7, torch.bfloat16: 2e-3}[dtype]
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=2 * rounding, atol=rounding)
    assert not logits.grad[0, 3].any()
    assert not logits.grad[:, -1].any()


def test_no_rows():
    logits = torch.randn(0, 4, 5, requires_grad=True)
    label_loss_sum(logits, torch.zeros(0, 4, dtype=torch.long)).backward()
    assert logits.grad.shape == logits.shape


def test_keeps_the_logits_once():
    logits = torch.randn(4, 65, 50, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes), lambda kept: kept):
        label_loss_sum(logits, torch.randint(0, 50, (4, 65)))
    assert sum(kept) == logits.nbytes + 4 * 65 * (8 + 4)


def test_a_target_of_no_logit_is_an_error():
    with pytest.raises((IndexError, RuntimeError)):
        target_loss_sum(torch.randn(1, 2, 5), torch.tensor([[1, 5]]))


def _over_the_vocabulary(dtype, block):
    """One of the ranks: its part of the logits; the last row has no target, the first ones one at each part's edges."""
    losses._BLOCK, before = block, losses._BLOCK
    try:
        grid = build_grid(tensor=torch.distributed.get_world_size())
        torch.manual_seed(0)
        whole = (3 * torch.randn(2, 5, 12)).to(dtype)
        targets = torch.tensor([[0, 11, 5, 6, 3], [2, 8, IGNORE, 9, IGNORE]])
        wide = whole.double().requires_grad_()
        expected = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        (0.37 * expected).backward()
        part = slice(grid.rank * 12 // grid.tensor, (grid.rank + 1) * 12 // grid.tensor)
        logits = whole[..., part].clone().requires_grad_()
        with traffic.count_traffic() as counted:
            loss = target_loss_sum(logits, targets, group=grid.tensor_group)
            (0.37 * loss).backward()
    finally:
        losses._BLOCK = before
    # A log-sum-exp between 8 and 16 is rounded by 5e-7, on its part and again, and a probability as much, relatively.
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(loss.double() * grid.tensor, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), wide.grad[..., part], rtol=rounding, atol=1e-8)
    assert counted.bytes() == (grid.tensor - 1) * 10 * 2 * 4
    return loss.item()


@pytest.mark.parametrize("block", [1, 1 << 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_parts_of_the_vocabulary(ranks, dtype, block):
    shares = ranks(2, _over_the_vocabulary, dtype, block)
    assert shares[0] == shares[1]


def _out_of_every_part():
    with pytest.raises((IndexError, RuntimeError)):
        target_loss_sum(torch.randn(1, 2, 5), torch.tensor([[1, 10]]), group=build_grid(tensor=2).tensor_group)


def test_over_parts_of_the_vocabulary_by_four_and_outside(ranks):
    ranks(4, _over_the_vocabulary, torch.float32, 1 << 21)
    ranks(2, _out_of_every_part)
