"""The loss as a sum over label tokens."""

from __future__ import annotations

import torch

from moe_dist.train.losses import IGNORE, count_labels, label_loss_sum


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
