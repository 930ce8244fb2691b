"""What all ranks agree on in a step, by one small all-reduce each."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moe_dist.parallel.grid import Grid
from moe_dist.train.losses import count_labels
from moe_dist.train.stop import StopFlag


def any_asked(stop: StopFlag, grid: Grid) -> bool:
    """Whether any rank has been asked to stop. Collective."""
    asked = torch.tensor(int(stop.requested), device=grid.device)
    if grid.world > 1:
        dist.all_reduce(asked)
    return bool(asked)


def agree(batches: list[dict], stop: bool, votes: int, grid: Grid) -> tuple[int, int, bool, int]:
    """Over all ranks: label tokens and real tokens of the step, whether any was asked to stop, and the sum of `votes`.
    Collective.

    batches: whole rows. The ranks of all stages and slices that share them count them once.
    """
    labels = real = 0
    if grid.is_first_stage and grid.slice_rank == 0:
        labels = sum(count_labels(batch["labels"]) for batch in batches)
        real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    total = torch.tensor([labels, real, int(stop), votes], device=grid.device)
    if grid.world > 1:
        dist.all_reduce(total)
    labels, real, stops, votes = total.tolist()
    return labels, real, stops > 0, votes


def global_mean(loss_sum: torch.Tensor, labels: int, grid: Grid) -> float:
    """The step's loss per label token over all ranks. Collective."""
    total = loss_sum.clone()
    if grid.world > 1:
        dist.all_reduce(total)
    return (total / max(labels, 1)).item()
