"""What one rank sees of the rows of its data rank.

Rows are dealt over the data axis; all ranks of a slice group have the same. The L tokens of a row are cut over the
sequence axis into blocks of M = L / sequence, and a block over the tensor axis into slices of S = M / tensor tokens.
A rank's embedding and its loss see its block, everything that works token by token sees its slice, and attention sees
whole rows. So masks are made of the position ids of whole rows, and targets are moved before they are cut: the last
token of a block is to predict the first of the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_dist.data import attention
from moe_dist.parallel.grid import Grid
from moe_dist.parallel.sequence import own_block, own_slice
from moe_dist.train.losses import next_labels


@dataclass(frozen=True)
class Rows:
    """A micro-batch, cut as this rank sees it.

    input_ids_BM, position_ids_BM: this sequence rank's block, int64. targets_BM: the label that each position of it is
    to predict, `IGNORE` where there is none. real_BS: which tokens of this rank's slice are not padding, bool.
    batch: the whole rows, as the data gave them.
    """

    input_ids_BM: torch.Tensor
    position_ids_BM: torch.Tensor
    targets_BM: torch.Tensor
    real_BS: torch.Tensor
    batch: dict[str, torch.Tensor]

    @property
    def are_cut(self) -> bool:
        """Whether other ranks hold a part of these rows."""
        return self.real_BS.shape != self.batch["attention_mask"].shape


def rank_rows(batch: dict[str, torch.Tensor], grid: Grid) -> Rows:
    """The part of a data rank's batch that this rank sees.

    batch: input_ids, labels, position_ids, attention_mask, int64 `[B,L]`, the same on all ranks of the slice group.
    L has to be divisible by sequence · tensor.
    """
    return Rows(
        input_ids_BM=own_block(batch["input_ids"], grid),
        position_ids_BM=own_block(batch["position_ids"], grid),
        targets_BM=own_block(next_labels(batch["labels"]), grid),
        real_BS=own_slice(batch["attention_mask"], grid).bool(),
        batch=batch,
    )


def model_inputs(rows: Rows, config, *, dtype: torch.dtype | None = None) -> dict:
    """The keyword arguments with which a transformers model is called for `rows`; see `moe_dist.data.attention`.

    Where rows are cut, attention gets ready masks of whole rows: the model would make its own of what it is given.
    Where whole rows need no mask, being one document each, it comes to the same of a part of them.
    """
    if not rows.are_cut:
        return attention.model_inputs(rows.batch, config, dtype=dtype)
    return {
        "input_ids": rows.input_ids_BM,
        "position_ids": rows.position_ids_BM,
        "attention_mask": attention.ready_masks(rows.batch["position_ids"], config, dtype=dtype),
        "use_cache": False,
    }
