"""Which data a skipped step had: so that somebody can look at it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from moe_dist.parallel.grid import Grid


def suspects(finite: Sequence[torch.Tensor], rows: Sequence[Sequence[tuple[str, int]]], grid: Grid) -> list[dict]:
    """The micro-batches whose loss was not finite, over all ranks; all of the step where only a gradient was not, which
    nobody can tell the batch of. Collective, for the rare step that is skipped.

    finite: of each micro-batch of this rank, whether its share of the loss was; none before the last pipeline stage.
    rows: (source, row) of each micro-batch of the step, as `TrainData.drawn` gives them. Returns dicts for JSON:
    {"rank", "micro_batch", "loss_finite", "rows"}, the rank that of `grid.data_rank`.
    """
    mine = (grid.data_rank, [bool(flag) for flag in finite])
    told = [mine]
    if grid.world > 1:
        told = [mine] * grid.world
        dist.all_gather_object(told, mine)
    finite_of: dict[int, list[bool]] = {}
    for rank, flags in filter(lambda one: one[1], told):  # of a data rank's rows each slice has a share
        finite_of[rank] = [a and b for a, b in zip(finite_of.get(rank, flags), flags, strict=True)]
    every = [
        {"rank": rank, "micro_batch": number, "loss_finite": flag, "rows": [list(at) for at in share]}
        for rank, flags in sorted(finite_of.items())
        for number, flag in enumerate(flags)
        if (share := rows[number * grid.data + rank])
    ]
    return [one for one in every if not one["loss_finite"]] or every
