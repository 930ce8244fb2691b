"""Who gets which tokens: routing shares, counted while the model runs."""

from __future__ import annotations

import torch
from torch import nn

from moe_dist.models.mixse.mixing import mixer_of


class RoutingRecorder:
    """Counts a MiXSE model's mixtures while it is entered:

        with RoutingRecorder(model) as recorder:
            model(...)
        recorder.shares()

    Padding is left out, by `mask_BL` where it is set (true for tokens that count; set it before each call of the
    model), else by the two-dimensional `attention_mask` of the call, where there is one.
    """

    def __init__(self, model: nn.Module):
        self.mixer = mixer_of(model)
        self.mask_BL: torch.Tensor | None = None
        self._sums: dict[int | None, torch.Tensor] = {}

    def __enter__(self) -> RoutingRecorder:
        self.mixer.listeners.append(self._see)
        return self

    def __exit__(self, *_) -> None:
        self.mixer.listeners.remove(self._see)

    def _see(self, block: int | None, alpha_BLN: torch.Tensor, mask: torch.Tensor | None) -> None:
        alpha_TN = alpha_BLN.flatten(0, 1)
        kept = self.mask_BL if self.mask_BL is not None else mask
        if kept is not None and kept.dim() == 2:
            # With a cache the mask spans the past too; the tokens of this call are its last ones.
            alpha_TN = alpha_TN[kept[:, -alpha_BLN.shape[1] :].flatten().bool()]
        first_T = alpha_TN.argmax(dim=1)
        counts = (
            torch.bincount(first_T, minlength=alpha_TN.shape[1]).double(),
            (alpha_TN > 0).sum(dim=0).double(),
            alpha_TN.double().sum(dim=0),
        )
        self._sums[block] = self._sums.get(block, 0) + torch.stack(counts).cpu()

    def counts(self) -> dict[int, torch.Tensor]:
        """Block -> `[3, n]`, float64: tokens whose largest weight is the expert's, tokens that it had a part in, and
        the sum of its weights. With one mixture for all blocks there is a single entry, block 0."""
        return {block or 0: sums.clone() for block, sums in sorted(self._sums.items(), key=lambda item: item[0] or 0)}

    def shares(self) -> dict[str, dict[str, float]]:
        """Over all blocks, for each expert: `first`, the share of tokens that it is first for (these add up to 1);
        `chosen`, the share that it has a part in; `weight`, its mean α. All zero where nothing was seen."""
        total = sum(self._sums.values(), torch.zeros(3, len(self.mixer.spec.experts), dtype=torch.float64))
        tokens = total[0].sum().clamp(min=1)
        return {
            name: dict(zip(("first", "chosen", "weight"), (total[:, i] / tokens).tolist(), strict=True))
            for i, name in enumerate(self.mixer.spec.experts)
        }
