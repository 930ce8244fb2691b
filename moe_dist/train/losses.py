"""The language-model loss, as a sum: dividing is the loop's matter, which knows the whole step.

The loss of an optimizer step is the sum over its label tokens divided by the *global* number of label tokens: over all
micro-batches of the step and all ranks. So packing, answer-only labels and accumulation change nothing, and neither
does the number of ranks. A mean per micro-batch would weigh tokens of short answers more.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

IGNORE = -100


def label_loss_sum(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Σ −log p(label) over label tokens, in float32: a scalar with gradient, exact zero without labels.

    labels_BL are aligned with the inputs, as transformers has them: the logits at position l predict the label at
    l + 1; `IGNORE` (−100) marks what is not learned.
    """
    targets_BL = next_labels(labels_BL)
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten(), ignore_index=IGNORE, reduction="sum")


def count_labels(labels_BL: torch.Tensor) -> int:
    """How many tokens carry loss in `label_loss_sum`."""
    return int((next_labels(labels_BL) != IGNORE).sum())


def next_labels(labels_BL: torch.Tensor) -> torch.Tensor:
    """The target of each position: the labels moved left by one, the last position without one."""
    return F.pad(labels_BL[:, 1:], (0, 1), value=IGNORE)
