"""Grouped MLP: every expert's two products and the activation between them, over rows sorted by expert.

    z_RF = x_RH · W_in[e]ᵀ (+ b_in[e])        F = 2I: gate and up stacked (F = I where a family has no gate)
    a_RI = activation(z_RF)
    y_RH = a_RI · W_out[e]ᵀ (+ b_out[e])

The weights come as *spans*: stacks of experts of which all train or none does. What the backward needs is all that a
span keeps: its rows if it trains, z if anything below or in it needs a gradient, nothing at all otherwise. With
`recompute` the rows are kept and z is computed again in the backward; nothing is routed or sent again.
"""

from __future__ import annotations

import torch

from moe_dist.ops import experts_grouped, experts_loop, experts_native
from moe_dist.ops.experts_loop import Activation, Span
from moe_dist.ops.memory import empty
from moe_dist.ops.swiglu import swiglu

__all__ = ["Activation", "Span", "grouped_mlp", "swiglu"]


def grouped_mlp(
    x_RH: torch.Tensor, spans: list[Span], *, activation: Activation, recompute: bool = False
) -> torch.Tensor:
    """The experts' outputs `[R,H]` for rows `[R,H]` that lie span after span and, within a span, seat after seat.

    The rows of all spans' counts must sum to R. Differentiable in the rows and in the spans' tensors that require
    grad; a seat without rows gets a gradient of exact zeros.
    """
    assert sum(sum(span.counts) for span in spans) == len(x_RH), "rows and counts disagree"
    tensors = [tensor for span in spans for tensor in span.tensors()]
    return _GroupedMLP.apply(x_RH, [span.counts for span in spans], activation, recompute, *tensors)


def _backend(x_RH: torch.Tensor, span: Span, activation: Activation):
    """One kernel for all experts where it is a kernel: CUDA, bf16, strides of whole 16 bytes. On a CPU torch's grouped
    product is a loop inside; the loops here keep everything between an expert's products in the cache and write their
    results into place."""
    sizes = (*span.w_in.shape[1:], *span.w_out.shape[1:])
    if x_RH.is_cuda and x_RH.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes):
        return experts_grouped
    return experts_native if experts_native.serves(x_RH, span, activation) else experts_loop


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RH, counts, activation, recompute, *tensors):
        x_RH = x_RH.contiguous()
        # One span's result is the result; those of several are written side by side.
        y_RH = empty(x_RH, len(x_RH), tensors[1].shape[1]) if len(counts) > 1 else None
        saved_x, saved_z, start = [], [], 0
        for i, span_counts in enumerate(counts):
            span = Span(*tensors[4 * i : 4 * i + 4], span_counts)
            rows = slice(start, start + sum(span_counts))
            start = rows.stop
            trains = any(ctx.needs_input_grad[4 + 4 * i : 8 + 4 * i])
            backward = trains or ctx.needs_input_grad[0]
            out = None if y_RH is None else y_RH[rows]
            done_RH, z_RF = _backend(x_RH, span, activation).forward(
                x_RH[rows], span, activation, keep_z=backward and not recompute, out=out
            )
            saved_x.append(x_RH[rows] if trains or (backward and recompute) else None)
            saved_z.append(z_RF)
        ctx.save_for_backward(*_apart(saved_x, x_RH), *saved_z, *tensors)
        ctx.counts, ctx.activation = counts, activation
        return done_RH if y_RH is None else y_RH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y_RH):
        grad_y_RH = grad_y_RH.contiguous()
        count = len(ctx.counts)
        kept = ctx.saved_tensors  # read once: a second reading fails under checkpointing of the caller
        saved, tensors = kept[: 2 * count], kept[2 * count :]
        needs_rows = ctx.needs_input_grad[0]
        several = needs_rows and count > 1
        grad_x_RH = empty(grad_y_RH, len(grad_y_RH), tensors[0].shape[2]) if several else None
        grads, start = [], 0
        for i, span_counts in enumerate(ctx.counts):
            span = Span(*tensors[4 * i : 4 * i + 4], span_counts)
            needs = (needs_rows, *ctx.needs_input_grad[4 + 4 * i : 8 + 4 * i])
            rows = slice(start, start + sum(span_counts))
            start = rows.stop
            if not any(needs):
                grads += [None] * 4
                continue
            x_RH, z_RF = saved[i], saved[count + i]
            done_RH, *span_grads = _backend(grad_y_RH, span, ctx.activation).backward(
                grad_y_RH[rows], x_RH, z_RF, span, ctx.activation, needs, out=grad_x_RH[rows] if several else None
            )
            if not several:
                grad_x_RH = done_RH
            grads += span_grads
        return grad_x_RH, None, None, None, *grads


def _apart(parts: list[torch.Tensor | None], whole_RH: torch.Tensor) -> list[torch.Tensor | None]:
    """The parts of `whole_RH`, copied where they are its smaller half: a view would keep all of it in memory."""
    if 2 * sum(len(part) for part in parts if part is not None) > len(whole_RH):
        return parts
    return [None if part is None else part.clone() for part in parts]
