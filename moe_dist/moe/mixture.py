"""Everything that a layer's experts do for its tokens, as one autograd function.

    forward     tokens travel (hops) -> rows by seat -> grouped MLP, weighted -> a sum for each token -> travel back
    backward    gradients travel the same ways; those of the rows are on their way home while the weights' are computed

One function, because what is kept and when something travels is then in one place: kept are the tokens as they arrived
(or, where they are fewer, the rows of the experts that train), z, and the probabilities. The rows by seat are made
again in the backward, and the experts' outputs are never kept: see `ops.grouped_mlp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moe_dist.moe.dispatch import DispatchPlan, Part
from moe_dist.moe.hop import first_rows
from moe_dist.ops import RowPlan, grouped_mlp, passes
from moe_dist.ops.experts_loop import Activation, Span
from moe_dist.parallel.collectives import Flight


@dataclass(frozen=True)
class How:
    """How a layer computes, whatever the batch.

    held: experts on each of the spans, in seat order. recompute: z is not kept but computed again in the backward.
    wire: dtype of sums on their way home. beside: called once in the forward while the tokens travel, with autograd on.
    backend: of the experts' products, see `ops.grouped_mlp`.
    """

    activation: Activation
    held: tuple[int, ...]
    wire: torch.dtype
    recompute: bool = False
    beside: Callable[[], None] | None = None
    backend: str = "auto"


def mixture(
    x_TH: torch.Tensor,
    probs_TK: torch.Tensor,
    plan: DispatchPlan,
    how: How,
    spans: Sequence[Sequence[torch.Tensor | None]],
) -> torch.Tensor:
    """y[t] = sum over k of probs[t,k] · expert[ids[t,k]](x[t]) -> `[T,H]` in the dtype of x.

    x_TH is computed with in the dtype of the weights. spans: of each its w_in, w_out, b_in, b_out, the last two may be
    None. Differentiable in x, the probabilities and the spans' tensors. Collective over the ranks of the plan's hops,
    forward and backward: what requires grad must be the same on all of them.
    """
    tensors = [tensor for span in spans for tensor in span]
    return _Mixture.apply(x_TH, probs_TK, plan, how, *tensors)


def weighted_after(
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    norm: Callable[[torch.Tensor], torch.Tensor],
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    probs_TK: torch.Tensor,
) -> torch.Tensor:
    """The mixture of a family that norms each expert's output row before it is weighted: y `[T,H]`, dtype of x.

    A norm is not linear, so neither can the probability stand before it nor can rows be summed where the expert is:
    each slot goes through `compute(x_NH, ids_N1, ones_N1)` as a token of its own.
    """
    top_k, wide = ids_TK.shape[1], torch.promote_types(x_TH.dtype, torch.float32)
    ids_N1 = ids_TK.reshape(-1, 1)
    ones_N1 = torch.ones(ids_N1.shape, dtype=wide, device=x_TH.device)
    rows_TKH = norm(compute(x_TH.repeat_interleave(top_k, dim=0), ids_N1, ones_N1)).unflatten(0, (-1, top_k))
    probs_TK = probs_TK.to(wide).masked_fill(ids_TK < 0, 0)
    return (rows_TKH.to(wide) * probs_TK.unsqueeze(2)).sum(1).to(x_TH.dtype)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, probs_TK, plan, how, *tensors):
        needed = _needed(ctx.needs_input_grad)
        dtype = tensors[1].dtype
        flights = [_leave(part, x_TH[part.tokens], dtype) for part in plan.parts]
        if how.beside is not None:
            with torch.enable_grad():
                how.beside()
        kept: list[torch.Tensor | None] = []
        backs = []
        for part, flight in zip(plan.parts, flights, strict=True):
            x_MH = _arrive(part, flight)
            spans = _spans(part, how, tensors)
            rows_RH = passes.permute(x_MH, part.seats, dtype=dtype)
            y_RH, zs = grouped_mlp.forward(
                rows_RH,
                spans,
                how.activation,
                factor_R=_by_row(part.probs_MK, part.seats),
                keep_z=[backward and not how.recompute for _, backward in needed],
                backend=how.backend,
            )
            wanted = _rows_wanted(spans, needed, how.recompute)
            kept += [*_tokens_or_rows(x_MH, rows_RH, wanted), *zs]
            del rows_RH
            out = passes.unpermute(y_RH, part.seats, dtype=_sum_dtype(part, how, x_TH.dtype))
            del y_RH
            backs.append(_leave_back(part, out, how))
        y_TH = [_come_home(part, back, x_TH.dtype) for part, back in zip(plan.parts, backs, strict=True)]
        ctx.save_for_backward(*kept, *tensors)
        ctx.plan, ctx.how, ctx.input_dtype, ctx.probs_dtype = plan, how, x_TH.dtype, probs_TK.dtype
        return y_TH[0] if len(y_TH) == 1 else torch.cat(y_TH)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TH):
        needs_x, needs_probs, _, _, *needs = ctx.needs_input_grad
        needed = _needed(ctx.needs_input_grad)
        plan, how = ctx.plan, ctx.how
        saved = ctx.saved_tensors  # read once: a second reading fails under checkpointing of the caller
        each = 2 + len(how.held)
        kept, tensors = saved[: each * len(plan.parts)], saved[each * len(plan.parts) :]
        dtype = tensors[1].dtype
        flights = [_leave(part, dy_TH[part.tokens], dtype) for part in plan.parts]
        homes, grads = [], [None] * len(tensors)
        for index, (part, flight) in enumerate(zip(plan.parts, flights, strict=True)):
            x_MH, rows_RH, *zs = kept[each * index : each * (index + 1)]
            spans = _spans(part, how, tensors)
            if x_MH is not None:
                first = first_rows(part.seats, _rows_wanted(spans, needed, how.recompute))
                rows_RH = passes.permute(x_MH, first, dtype=dtype)
            elif rows_RH is None:
                rows_RH = dy_TH[:0].to(dtype)
            dy_RH = passes.permute(_arrive(part, flight), part.seats, dtype=dtype)
            home = _Home(part, how, ctx.input_dtype)
            part_grads = grouped_mlp.backward(
                dy_RH,
                rows_RH,
                zs,
                spans,
                how.activation,
                factor_R=_by_row(part.probs_MK, part.seats),
                needs_rows=needs_x,
                needs_factor=needs_probs,
                needs=needs,
                on_rows=home.leave,
                backend=how.backend,
            )
            homes.append(home)
            grads = [_sum(old, new) for old, new in zip(grads, part_grads, strict=True)]
        landed = [home.land() for home in homes]
        dx_TH = torch.cat([dx for dx, _ in landed]) if needs_x else None
        dprobs_TK = torch.cat([dprobs for _, dprobs in landed]).to(ctx.probs_dtype) if needs_probs else None
        return dx_TH, dprobs_TK, None, None, *grads


class _Home:
    """The way home of the gradients of one part: they leave as soon as they are there."""

    def __init__(self, part: Part, how: How, dtype: torch.dtype):
        self.part, self.how, self.dtype = part, how, dtype
        self.rows: Flight | torch.Tensor | None = None
        self.scalars: Flight | torch.Tensor | None = None

    def leave(self, dx_RH: torch.Tensor | None, dfactor_R: torch.Tensor | None) -> None:
        part = self.part
        if dx_RH is not None:
            dx_MH = passes.unpermute(dx_RH, part.seats, dtype=_sum_dtype(part, self.how, self.dtype))
            self.rows = _leave_back(part, dx_MH, self.how)
        if dfactor_R is not None:
            dprobs_MK = torch.zeros_like(part.probs_MK)
            dprobs_MK.view(-1)[part.seats.slot_of_row_N.long()] = dfactor_R
            for hop in reversed(part.hops[1:]):
                dprobs_MK = hop.pick_back(hop.start_scalars_back(dprobs_MK))
            self.scalars = part.hops[0].start_scalars_back(dprobs_MK) if part.hops else dprobs_MK

    def land(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        dx_TH = None if self.rows is None else _come_home(self.part, self.rows, self.dtype)
        dprobs_TK = self.scalars
        if dprobs_TK is not None and self.part.hops:
            dprobs_TK = self.part.hops[0].pick_back(dprobs_TK)
        return dx_TH, dprobs_TK


# The ways. What travels over the first hop is under way while something else is computed; further hops (inside a node)
# are waited for.


def _leave(part: Part, x_TH: torch.Tensor, dtype: torch.dtype) -> Flight | torch.Tensor:
    return part.hops[0].start(x_TH, dtype) if part.hops else x_TH


def _arrive(part: Part, flight: Flight | torch.Tensor) -> torch.Tensor:
    x_MH = flight.land() if part.hops else flight
    for hop in part.hops[1:]:
        x_MH = hop.start(x_MH, x_MH.dtype).land()
    return x_MH


def _sum_dtype(part: Part, how: How, dtype: torch.dtype) -> torch.dtype:
    """In which the experts' sums leave, where tokens have `dtype`.

    A sum that is one of several within a node is not rounded until these are added up: over two hops a token's result
    is then rounded as often as over one. Inside a node bytes are cheap.
    """
    if len(part.hops) > 1:
        return torch.promote_types(how.wire, torch.float32)
    return how.wire if part.hops else dtype


def _leave_back(part: Part, y_MH: torch.Tensor, how: How) -> Flight | torch.Tensor:
    for hop in reversed(part.hops[1:]):
        y_MH = hop.sum_back(hop.start_back(y_MH), how.wire)
    return part.hops[0].start_back(y_MH) if part.hops else y_MH


def _come_home(part: Part, flight: Flight | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return part.hops[0].sum_back(flight, dtype) if part.hops else flight


def _spans(part: Part, how: How, tensors: Sequence[torch.Tensor | None]) -> list[Span]:
    spans, start = [], 0
    for index, held in enumerate(how.held):
        seats = slice(start, start + held)
        counts, counts_S = part.seat_counts[seats], part.seats.counts_E[seats]
        spans.append(Span(*tensors[4 * index : 4 * index + 4], counts, counts_S))
        start += held
    return spans


def _by_row(probs_MK: torch.Tensor, seats: RowPlan) -> torch.Tensor:
    """The probability of each row, `[R]`."""
    return probs_MK.flatten()[seats.slot_of_row_N.long()]


def _needed(needs_input_grad: Sequence[bool]) -> list[tuple[bool, bool]]:
    """Of each span: whether it trains, and whether it has a part in the backward."""
    needs_x, needs_probs, _, _, *needs = needs_input_grad
    trains = [any(needs[i : i + 4]) for i in range(0, len(needs), 4)]
    return [(train, train or needs_x or needs_probs) for train in trains]


def _rows_wanted(spans: Sequence[Span], needed: Sequence[tuple[bool, bool]], recompute: bool) -> int:
    """How many of the first rows the backward needs: of spans that train, and of those whose z it computes again."""
    wanted = [trains or (recompute and backward) for trains, backward in needed]
    assert wanted == sorted(wanted, reverse=True), "spans that train come first"
    return sum(sum(span.counts) for span, want in zip(spans, wanted, strict=True) if want)


def _tokens_or_rows(
    x_MH: torch.Tensor, rows_RH: torch.Tensor, wanted: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What to keep for `wanted` rows: the tokens, or those rows if they are fewer; (tokens, rows), one at most."""
    if not wanted:
        return None, None
    return (x_MH, None) if len(x_MH) <= wanted else (None, rows_RH[:wanted].clone())


def _sum(old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    return new if old is None or new is None else old.add_(new)
