"""The products of a span of experts as one batched product each: every seat's rows, padded to those of the fullest.

Pad rows are zeros on both sides of each product. Nothing between the products is computed for them, so that whatever
an activation makes of a zero, or of a bias alone, is never there.
"""

from __future__ import annotations

from functools import partial

import torch

from moe_dist.ops import experts_whole
from moe_dist.ops.experts_loop import Activation, Span
from moe_dist.ops.memory import empty

MOST_PADDED = 1.25  # padded rows to rows, up to which it serves


def serves(rows: torch.Tensor, span: Span, activation: Activation) -> bool:
    """Whether this back end is for such a span: the seats' rows are so many each that padding them costs little."""
    return len(span.counts) * max(span.counts, default=0) <= MOST_PADDED * sum(span.counts)


class _Products:
    """See `experts_whole.Products`: rows are laid out as `[S,C,B]`, S the seats that have experts."""

    def __init__(self, span: Span, rows: torch.Tensor):
        self.held, self.depth = len(span.counts), max(span.counts)
        self.place_R = None  # of each row among the S·C; where these are all rows, they lie there already
        if self.held * self.depth != len(rows):
            counts_S = span.counts_on(rows.device)
            starts_S = counts_S.cumsum(0) - counts_S
            shift_S = torch.arange(self.held, device=rows.device) * self.depth - starts_S
            shift_R = shift_S.repeat_interleave(counts_S, output_size=len(rows))
            self.place_R = torch.arange(len(rows), device=rows.device) + shift_R

    def lay(self, x_RB: torch.Tensor) -> torch.Tensor:
        if self.place_R is not None:
            laid = empty(x_RB, self.held * self.depth, x_RB.shape[1]).zero_()
            x_RB = laid.index_copy_(0, self.place_R, x_RB)
        return x_RB.view(self.held, self.depth, -1)

    def linear(self, laid_x: torch.Tensor, w_SBA: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        rows, width = self.held * self.depth, w_SBA.shape[1]
        direct = self.place_R is None and out is not None
        laid_y = out if direct else empty(laid_x, rows, width)
        torch.bmm(laid_x, w_SBA[: self.held].transpose(1, 2), out=laid_y.view(self.held, self.depth, width))
        if self.place_R is None:
            return laid_y
        out = empty(laid_x, len(self.place_R), width) if out is None else out
        return torch.index_select(laid_y, 0, self.place_R, out=out)

    def weight_grad(self, laid_grad: torch.Tensor, laid_x: torch.Tensor, w_SBA: torch.Tensor) -> torch.Tensor:
        grad_SBA = empty(laid_x, *w_SBA.shape)
        torch.bmm(laid_grad.transpose(1, 2), laid_x, out=grad_SBA[: self.held])
        grad_SBA[self.held :].zero_()
        return grad_SBA


forward = partial(experts_whole.forward, _Products)
backward = partial(experts_whole.backward, _Products)
