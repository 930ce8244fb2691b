"""Activation recomputation by sublayer: attention and dense MLPs whole, experts only between their two products.

The router and the way of the tokens are never part of it: a token is routed once, and its rows, once received, are
kept. What is computed again in the backward crosses no rank, so the backward moves the same bytes with and without
recomputation, and nothing is counted twice. The sequence axis is the exception: its exchanges lie inside of attention,
around the very part that is worth computing again, and those of the forward are repeated.
"""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_dist.moe.layer import MoEExperts


def enable_recompute(model: nn.Module) -> None:
    """Make every decoder layer of the model keep only the inputs of its sublayers while it trains."""
    for module in model.modules():
        if isinstance(module, MoEExperts):
            module.recompute = True
        elif isinstance(module, nn.ModuleList):
            for layer in module:
                _wrap_sublayers(layer)


def _wrap_sublayers(module: nn.Module) -> None:
    """Wrap the children that multiply by matrices; descend into the one that holds experts."""
    for child in module.children():
        if any(isinstance(part, MoEExperts) for part in child.modules()):
            if not isinstance(child, MoEExperts):
                _wrap_sublayers(child)
        elif any(isinstance(part, nn.Linear) for part in child.modules()):
            child.forward = _recomputed(child, child.forward)


def _recomputed(module: nn.Module, forward):
    @functools.wraps(forward)
    def run(*args, **kwargs):
        if not module.training:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
