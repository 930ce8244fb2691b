"""A dispatch that sends each slot to the copy that the placement chooses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import torch

from moe_dist.moe import layer
from moe_dist.moe.dispatch import DispatchPlan, plan_dispatch
from moe_dist.moe.placement import Placement
from moe_dist.parallel.grid import Grid


@contextlib.contextmanager
def dispatch_to_copies() -> Iterator[None]:
    """Within it every place is an expert of its own to the dispatch; counts are still of experts."""
    with patch.object(layer, "plan_dispatch", _plan):
        yield


def _plan(ids_TK: torch.Tensor, placement: Placement, grid: Grid) -> DispatchPlan:
    copies, places = placement.copies(grid.expert_rank), sum(placement.held)
    flat = SimpleNamespace(position=range(places), num_experts=places, ranks=placement.ranks)
    plan = plan_dispatch(copies.places(ids_TK), flat, grid)
    counts_E = torch.zeros(placement.num_experts, dtype=torch.int64)
    return replace(plan, counts_E=counts_E.index_add(0, copies.experts_of_places, plan.counts_E))
