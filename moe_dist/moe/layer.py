"""The experts of one MoE block, spread over the ranks of an expert group.

`MoEExperts` stands where a transformers model has its own experts module and keeps that module's contract:
`experts(hidden_TH, ids_TK, weights_TK) -> TH`. The router, shared experts and the block around it stay the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from moe_dist.moe.dispatch import plan_dispatch
from moe_dist.moe.experts import ExpertSpan, ExpertSpec
from moe_dist.moe.mixture import How, mixture, weighted_after
from moe_dist.moe.placement import Placement
from moe_dist.moe.statistics import LoadStatistics
from moe_dist.parallel.grid import Grid

Recorder = Callable[[torch.Tensor, torch.Tensor], None]


class MoEExperts(nn.Module):
    """This rank's share of a layer's experts, and the way of the tokens to all of them.

    Args:
        spec: what the experts compute.
        placement: which rank holds which expert, and which of them train.
        grid: the ranks; `grid.expert` must equal the number of lists in the placement.
        dtype, device: of the weights, which start as zeros and are filled by loading.
        post_norm: a module applied to each expert's output row before weighting (few families have one).

    Attributes set from outside:
        dispatcher, chunks: the way of the tokens, and in how many parts they travel; see `moe.dispatch`.
        wide_sums: what a token's experts on one rank add up to travels home in fp32, not in the dtype of hidden.
        beside: called once in each forward while tokens travel.
        backend: which of `ops.grouped_mlp.BACKENDS` computes wherever it serves, or "auto".
        recompute: compute the expert's inner activations again in the backward instead of keeping them.
        capacity_factor: None is dropless. Otherwise each rank sends at most
            ceil(capacity_factor · T · K / E) of its T tokens to an expert; later ones are dropped and counted.
        token_mask_T: bool, True for real tokens. Padding is not sent to any expert and not counted; its output is 0.
        recorders: functions called with (ids_TK, weights_TK), padding marked by id −1.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        placement: Placement,
        grid: Grid,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        post_norm: nn.Module | None = None,
    ):
        super().__init__()
        assert placement.num_experts == spec.num_experts
        assert len(placement.ranks) == grid.expert, "one list of experts for each rank of the expert group"
        self.spec, self.placement, self.grid = spec, placement, grid
        trainable_ids, frozen_ids = placement.seat_ids(grid.expert_rank)
        make = {"dtype": dtype, "device": device}
        self.trainable = ExpertSpan(spec, trainable_ids, trains=True, **make) if trainable_ids else None
        self.frozen = ExpertSpan(spec, frozen_ids, trains=False, **make) if frozen_ids else None
        self.post_norm = post_norm
        self.statistics = LoadStatistics(spec.num_experts)
        self.recompute = False
        self.dispatcher = "auto"
        self.chunks = 1
        self.backend = "auto"
        self.wide_sums = False
        self.beside: Callable[[], None] | None = None
        self.capacity_factor: float | None = None
        self.token_mask_T: torch.Tensor | None = None
        self.recorders: list[Recorder] = []

    def spans(self) -> list[ExpertSpan]:
        return [span for span in (self.trainable, self.frozen) if span is not None]

    def expert_parameters(self) -> Iterator[tuple[str, nn.Parameter, tuple[int | None, ...]]]:
        """(parameter name without span, parameter `[S,...]`, global expert id of each seat) over both spans."""
        for span in self.spans():
            for name, parameter in span.named_parameters():
                yield name, parameter, span.seat_ids

    def forward(self, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """hidden `[T,H]`, chosen experts `[T,K]`, their weights `[T,K]` -> `[T,H]`, dtype of hidden.

        Experts compute in the dtype of the frozen ones, where there are any, else in that of hidden; parameters that
        train may be fp32 beside frozen bf16 ones. Autocast changes nothing in here, as in transformers' own experts.
        Collective over the expert group: every rank calls it, also with T = 0. Whether the backward communicates is
        the same on all ranks: all hold the same spans, and the input requires grad on all or on none.
        """
        if self.token_mask_T is not None:
            ids_TK = ids_TK.masked_fill(~self.token_mask_T[:, None], -1)
        for record in self.recorders:
            record(ids_TK, weights_TK)
        dropped = 0
        if self.capacity_factor is not None:
            ids_TK, dropped = drop_over_capacity(ids_TK, self.spec.num_experts, self.capacity_factor)

        def compute(x_TH, chosen_TK, probs_TK):
            return self._mixture(x_TH, chosen_TK, probs_TK, dropped)

        if self.post_norm is None:
            return compute(hidden_TH, ids_TK, weights_TK)
        return weighted_after(compute, self.post_norm, hidden_TH, ids_TK, weights_TK)

    def _mixture(self, hidden_TH, ids_TK, weights_TK, dropped) -> torch.Tensor:
        plan = plan_dispatch(
            ids_TK, weights_TK, self.placement, self.grid, dispatcher=self.dispatcher, chunks=self.chunks
        )
        self.statistics.add(plan.counts_E, dropped)
        dtype = hidden_TH.dtype if self.frozen is None else self.frozen.down_proj.dtype
        wire = torch.promote_types(hidden_TH.dtype, torch.float32) if self.wide_sums else hidden_TH.dtype
        held = tuple(span.held for span in self.spans())
        how = How(self.spec.activation, held, wire, self.recompute, self.beside, self.backend)
        with torch.autocast(hidden_TH.device.type, enabled=False):
            return mixture(hidden_TH, weights_TK, plan, how, [span.tensors(dtype) for span in self.spans()])


def drop_over_capacity(
    ids_TK: torch.Tensor, num_experts: int, capacity_factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mark with −1 the slots beyond each expert's capacity, ceil(capacity_factor · T·K / E), in token order.

    T counts real tokens: slots that are already negative take no capacity. Returns the ids and how many were
    dropped here, as an int64 scalar tensor.
    """
    flat_N = ids_TK.flatten().long()
    real_N = flat_N >= 0
    capacity = torch.ceil(real_N.sum() * capacity_factor / num_experts)
    # Place of each slot among the slots of its expert: stable sort by expert, minus where that expert's run starts.
    order_N = torch.argsort(flat_N, stable=True)
    sorted_N = flat_N[order_N]
    start_N = torch.searchsorted(sorted_N, sorted_N)
    place_N = torch.empty_like(flat_N)
    place_N[order_N] = torch.arange(len(flat_N), device=flat_N.device) - start_N
    over_N = real_N & (place_N >= capacity)
    return flat_N.masked_fill(over_N, -1).view_as(ids_TK), over_N.sum()
