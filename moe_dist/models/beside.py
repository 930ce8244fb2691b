"""Shared experts that compute while the tokens of their block travel to the routed ones.

transformers' blocks call the shared experts after the routed ones (DeepSeek, GLM and their like): their input is known
before, so the experts layer runs them as soon as its tokens are under way, and the block's own call gets that result.
A block that calls them first (Qwen2-MoE) has computed them before any token leaves: there nothing changes.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from moe_dist.moe.layer import MoEExperts

NAMES = ("shared_experts", "shared_expert", "shared_mlp")


def compute_shared_experts_beside(model: nn.Module) -> int:
    """Let every block of the model that has shared experts beside a layer of ours do so -> how many blocks have."""
    found = 0
    for block in model.modules():
        layers = [child for child in block.children() if isinstance(child, MoEExperts)]
        shared = [getattr(block, name) for name in NAMES if isinstance(getattr(block, name, None), nn.Module)]
        if len(layers) == len(shared) == 1:
            _Beside(block, layers[0], shared[0])
            found += 1
    return found


class _Beside:
    """The result of a block's shared experts, from where it is computed to where the block asks for it."""

    def __init__(self, block: nn.Module, layer: MoEExperts, shared: nn.Module):
        self._compute = shared.forward
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        block.register_forward_pre_hook(self._enter)
        layer.beside = self._run
        # A function: a bound method takes none of the names that `wraps` writes.
        shared.forward = functools.wraps(shared.forward)(lambda x: self._give(x))

    def _enter(self, block: nn.Module, args: tuple) -> None:
        self._input, self._output = (args[0] if args else None), None

    def _run(self) -> None:
        if self._input is not None:
            self._output = self._compute(self._input)

    def _give(self, x: torch.Tensor) -> torch.Tensor:
        """The shared experts' output for x: what `_run` has computed, if it was for this very tensor."""
        output, same = self._output, x is self._input
        self._input = self._output = None
        return output if same and output is not None else self._compute(x)
