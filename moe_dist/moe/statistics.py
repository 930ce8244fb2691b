"""What every MoE layer counts while it runs: load, entropy, dead experts, drops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist


class LoadStatistics:
    """Counts of one layer since the last reset, on this rank. Integers, so no precision is lost over a long run.

    Activation recomputation does not run the layer again, so nothing is counted twice.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.reset()

    def reset(self) -> None:
        self.counts_E: torch.Tensor | None = None
        self.dropped: torch.Tensor | int = 0

    def add(self, counts_E: torch.Tensor, dropped: torch.Tensor | int) -> None:
        self.counts_E = counts_E.clone() if self.counts_E is None else self.counts_E + counts_E
        self.dropped = self.dropped + dropped

    def total(self, group: dist.ProcessGroup | None, device: torch.device | str = "cpu") -> torch.Tensor:
        """Counts `[E+1]` int64 summed over `group`: tokens of each expert, then dropped slots. Collective."""
        counts_E = self.counts_E
        if counts_E is None:
            counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        dropped = torch.as_tensor(self.dropped, dtype=torch.int64, device=counts_E.device).view(1)
        total = torch.cat([counts_E, dropped])
        if group is not None:
            dist.all_reduce(total, group=group)
        return total


def rank_load_max(total: torch.Tensor, ranks: Sequence[Mapping[int, float]]) -> float:
    """The busiest rank's tokens over the mean (1 is balance). ranks: the part that each computes of its experts."""
    counts_E = total[:-1].tolist()
    loads_P = [sum(counts_E[expert] * part for expert, part in held.items()) for held in ranks]
    return max(loads_P) * len(loads_P) / sum(loads_P) if any(loads_P) else 0.0


def summarise(total: torch.Tensor) -> dict[str, float]:
    """Figures of one layer from `LoadStatistics.total`.

    load_max: the busiest expert's tokens over the mean (1 is perfect balance); load_entropy: entropy of the shares
    over log E (1 is perfect balance); dead: experts without a token; dropped: share of slots dropped by capacity.
    """
    counts_E, dropped = total[:-1].double(), float(total[-1])
    kept, num_experts = float(counts_E.sum()), len(counts_E)
    if not kept:
        share = 1.0 if dropped else 0.0
        return {"load_max": 0.0, "load_entropy": 0.0, "dead": float(num_experts), "dropped": share}
    share_E = counts_E / kept
    entropy = -torch.special.xlogy(share_E, share_E).sum().item()
    return {
        "load_max": float(counts_E.max()) * num_experts / kept,
        "load_entropy": entropy / math.log(num_experts) if num_experts > 1 else 1.0,
        "dead": float((counts_E == 0).sum()),
        "dropped": dropped / (kept + dropped),
    }
