"""Cutting: from a whole model on the meta device to what one rank holds of it, axis by axis.

Names do not change: whatever is left is called as in the whole model, so that loading, checkpoints and exports need
not know how a model was cut.
"""

from __future__ import annotations

import torch
from torch import nn

from moe_dist.models.stages import keep_stage
from moe_dist.models.surgery import Seating, Trainable, moe_layers, swap
from moe_dist.models.tensor import check_tensors, cut_tensors
from moe_dist.models.ulysses import spread_attention
from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import Grid


def swap_and_cut(
    model: nn.Module, grid: Grid, *, trainable: Trainable, placement: Seating, dense: bool
) -> list[tuple[str, MoEExperts]]:
    """`swap`, then `cut`: (path, layer) of the experts layers that this rank has. The experts of other stages never
    take memory; the arguments are those of `swap`."""
    device = "meta" if grid.pipeline > 1 else None
    swap(model, grid, trainable=trainable, placement=placement, dense=dense, device=device)
    cut(model, grid)
    layers = moe_layers(model)
    for span in (span for _, layer in layers for span in layer.spans()):
        for name, parameter in span.named_parameters():
            if parameter.is_meta:
                weight = torch.zeros_like(parameter, device=grid.device)
                filled = nn.Parameter(weight, requires_grad=parameter.requires_grad)
                filled.is_expert = True
                setattr(span, name, filled)
    return layers


def cut(model: nn.Module, grid: Grid) -> None:
    """Keep this rank's pipeline stage and its part of tensor-parallel weights, and make attention exchange heads for
    tokens over the sequence axis. In place; nothing where these axes have size 1.

    Needs sizes and no process groups, so it works for `--dry-run`. Raises UserError where the model does not allow a
    size, saying what would work.
    """
    check_tensors(model, grid)
    keep_stage(model, grid)
    cut_tensors(model, grid)
    spread_attention(model, grid)
