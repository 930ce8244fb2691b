"""The products of a span of experts in one grouped kernel each: the back end of the grouped MLP on CUDA in bf16."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from moe_dist.ops import experts_whole
from moe_dist.ops.experts_loop import Activation, Span


def serves(rows: torch.Tensor, span: Span, activation: Activation) -> bool:
    """Whether this back end computes such a span: rows of whole 16 bytes, in bf16 or, on a CPU, in fp32."""
    sizes = (*span.w_in.shape[1:], *span.w_out.shape[1:])
    dtypes = (torch.bfloat16,) if rows.is_cuda else (torch.bfloat16, torch.float32)
    return rows.dtype in dtypes and all(size * rows.element_size() % 16 == 0 for size in sizes)


class _Products:
    """See `experts_whole.Products`: rows are taken as they lie."""

    def __init__(self, span: Span, rows: torch.Tensor):
        self.held = len(span.counts)
        self.offsets_S = span.counts_on(rows.device).cumsum(0).to(torch.int32)

    def lay(self, x_RB: torch.Tensor) -> torch.Tensor:
        return x_RB

    def linear(self, laid_x: torch.Tensor, w_SBA: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        y_RB = F.grouped_mm(laid_x, w_SBA[: self.held].transpose(1, 2), offs=self.offsets_S)
        return y_RB if out is None else out.copy_(y_RB)

    def weight_grad(self, laid_grad: torch.Tensor, laid_x: torch.Tensor, w_SBA: torch.Tensor) -> torch.Tensor:
        # The kernel gives zeros where a seat has no rows; pad seats get them here.
        held_SBA = F.grouped_mm(laid_grad.t(), laid_x, offs=self.offsets_S)
        pads = len(w_SBA) - self.held
        return F.pad(held_SBA, (0, 0, 0, 0, 0, pads)) if pads else held_SBA


forward = partial(experts_whole.forward, _Products)
backward = partial(experts_whole.backward, _Products)
