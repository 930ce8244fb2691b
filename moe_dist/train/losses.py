"""The language-model loss, as a sum: dividing is the loop's matter, which knows the whole step.

The loss of an optimizer step is the sum over its label tokens divided by the *global* number of label tokens: over all
micro-batches of the step and all ranks. So packing, answer-only labels and accumulation change nothing, and neither
does the number of ranks. A mean per micro-batch would weigh tokens of short answers more.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional as F

from moe_dist.parallel.collectives import gather
from moe_dist.parallel.tensor import own_ids

IGNORE = -100
_BLOCK = 1 << 21  # logits in float32 at a time: 8 MB, which caches hold


def label_loss_sum(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Σ −log p(label) over label tokens, in float32: a scalar with gradient, exact zero without labels.

    labels_BL are aligned with the inputs, as transformers has them: the logits at position l predict the label at
    l + 1; `IGNORE` (−100) marks what is not learned.
    """
    return target_loss_sum(logits_BLV, next_labels(labels_BL))


def target_loss_sum(
    logits_BMV: torch.Tensor, targets_BM: torch.Tensor, *, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Σ −log p(target) over the positions that have one: `targets_BM` is what each position is to predict, or `IGNORE`.

    group: the ranks that hold the logits of the same tokens, each an equal part of the vocabulary in rank order, V of
    P · V logits. Each returns its share, 1/P of the sum; the gradient of its logits is that of the whole sum when every
    rank calls backward on its share with the same factor, for each logit enters the shares of all P ranks.
    """
    return _TargetLossSum.apply(logits_BMV.flatten(0, 1), targets_BM.flatten(), group)


class _TargetLossSum(torch.autograd.Function):
    """Cross-entropy a block of rows at a time. What is kept are the logits as they are, in their own dtype, and one
    number a row; torch's would keep them again in float32, and the logarithms of the probabilities, and give back
    gradients in float32: several times the largest tensor of many a model."""

    @staticmethod
    def forward(ctx, logits_NV, targets_N, group):
        part, parts = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        places_N, elsewhere_N = own_ids(targets_N.clamp(min=0), part, logits_NV.shape[1], parts)
        lse_N = torch.cat([logits_NV[rows].float().logsumexp(dim=1) for rows in _blocks(logits_NV)])
        picked_N = logits_NV.gather(1, places_N.unsqueeze(1)).squeeze(1).float()
        if group is not None:
            picked_N = picked_N.masked_fill(elsewhere_N, 0.0)
            lse_PN, picked_PN = gather(torch.stack([lse_N, picked_N]), group, what="vocabulary").unbind(dim=1)
            # log Σ exp over the vocabulary, from those over its parts; one rank has picked, the others have zero.
            lse_N, picked_N = lse_PN.logsumexp(dim=0), picked_PN.sum(dim=0)
        ctx.save_for_backward(logits_NV, targets_N, lse_N)
        ctx.part, ctx.parts = part, parts
        return torch.where(targets_N == IGNORE, 0.0, lse_N - picked_N).sum() / parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """d/dlogits = (softmax − one-hot) · grad for positions with a target, zero for the others. Over P ranks the
        shares of 1/P add up to that."""
        logits_NV, targets_N, lse_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        for rows in _blocks(logits_NV):
            targets = targets_N[rows].unsqueeze(1)
            places, elsewhere = own_ids(targets.clamp(min=0), ctx.part, logits_NV.shape[1], ctx.parts)
            block = (logits_NV[rows].float() - lse_N[rows].unsqueeze(1)).exp_()
            block.scatter_add_(1, places, elsewhere.to(block.dtype) - 1)
            grad_NV[rows] = block.mul_(grad).masked_fill_(targets == IGNORE, 0.0)
        return grad_NV, None, None


def _blocks(logits_NV: torch.Tensor) -> list[slice]:
    """Blocks of rows; one even where there are none."""
    count, size = logits_NV.shape
    step = max(_BLOCK // size, 1)
    return [slice(start, start + step) for start in range(0, max(count, 1), step)]


def count_labels(labels_BL: torch.Tensor) -> int:
    """How many tokens carry loss in `label_loss_sum`."""
    return int((next_labels(labels_BL) != IGNORE).sum())


def next_labels(labels_BL: torch.Tensor) -> torch.Tensor:
    """The target of each position: the labels moved left by one, the last position without one."""
    return F.pad(labels_BL[:, 1:], (0, 1), value=IGNORE)
