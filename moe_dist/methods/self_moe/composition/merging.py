"""Merging several LoRA experts into one dense model: TIES and DARE, on the changes of the weights.

Both are PEFT's own functions (`peft.utils.merge_utils`), given each expert's ΔW = (alpha / rank) · B A. PEFT's
`add_weighted_adapter` merges A and B apart, or ΔW again cut down to a rank: neither gives back an expert that is merged
with itself. A dense result has no such limits.

    TIES (arXiv 2306.01708)  keep the largest entries of each ΔW, elect a sign for each entry, average those who agree
    DARE (arXiv 2311.03099)  drop entries at random, divide the others by the share that is kept, sum
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from moe_dist.errors import UserError
from moe_dist.methods.self_moe.composition.config import ComposeSection

DENSITIES = {"ties": 0.2, "dare": 0.1}

Combine = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def settings_of(section: ComposeSection, *, experts: int) -> dict[str, float | int]:
    """What decides the result of ties and dare: `density`, `weight`, `seed`, with what their papers say where unset."""
    weight = 1.0 if section.method == "ties" else 1 / experts
    return {
        "density": DENSITIES[section.method] if section.density is None else section.density,
        "weight": weight if section.weight is None else section.weight,
        "seed": section.seed,
    }


def combination(method: str, *, experts: int, density: float, weight: float, seed: int) -> Combine:
    """[ΔW of each expert] -> the merged ΔW, float32. `method`: ties or dare.

    Calls draw one after the other from `seed` (dare), so the same calls in the same order give the same result.
    """
    try:
        from peft.utils import merge_utils
    except ImportError:
        raise UserError("TIES and DARE are PEFT's, which is not installed; pip install 'moe_dist[lora]'") from None
    function = {"ties": merge_utils.ties, "dare": merge_utils.dare_linear}[method]
    state = torch.Generator().manual_seed(seed).get_state()

    def combine(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        nonlocal state
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a density of 1 drops nothing
            torch.set_rng_state(state)
            merged = function(list(deltas), torch.full((experts,), weight), density)
            state = torch.get_rng_state()
        return merged

    return combine
