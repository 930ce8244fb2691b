"""Grouped MLP: every expert's two products and the activation between them, over rows sorted by expert.

    z_RF = x_RH · W_in[e]ᵀ (+ b_in[e])                 F = 2I: gate and up stacked (F = I where a family has no gate)
    a_RI = p_R · activation(z_RF)                      p: the row's probability, or 1
    y_RH = a_RI · W_out[e]ᵀ (+ p_R · b_out[e])

Two passes without autograd; `moe_dist.moe.mixture` makes one differentiable function of them and the way of the rows.
The weights come as *spans*: stacks of experts of which all train or none does. The probability stands at the
activation, not at the sum of a token's rows: its gradient, <dy · W_out, activation(z)>, then needs no y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moe_dist.ops import experts_batched, experts_grouped, experts_loop, experts_native
from moe_dist.ops.experts_loop import Activation, Span
from moe_dist.ops.memory import empty
from moe_dist.ops.swiglu import swiglu

__all__ = ["BACKENDS", "Activation", "Span", "backward", "forward", "serving", "swiglu"]

BACKENDS = {
    "loop": experts_loop,
    "grouped": experts_grouped,
    "native": experts_native,
    "batched": experts_batched,
}


def forward(
    x_RH: torch.Tensor,
    spans: Sequence[Span],
    activation: Activation,
    *,
    factor_R: torch.Tensor | None = None,
    keep_z: Sequence[bool],
    backend: str = "auto",
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """(y `[R,H]`, z `[R,F]` of each span or None) for rows that lie span after span and, within one, seat after seat.

    x_RH: contiguous, in the dtype of the weights. factor_R: p, float32 (float64 in float64). keep_z: of each span.
    backend: one of `BACKENDS`, wherever it serves, or "auto"; the same in the backward.
    """
    assert sum(sum(span.counts) for span in spans) == len(x_RH), "rows and counts disagree"
    # One span's result is the result; those of several are written side by side.
    y_RH = empty(x_RH, len(x_RH), spans[0].w_out.shape[1]) if len(spans) != 1 else None
    zs = []
    for (span, rows), keep in zip(_rows(spans), keep_z, strict=True):
        out = None if y_RH is None else y_RH[rows]
        factor = None if factor_R is None else factor_R[rows]
        done_RH, z_RF = _backend(backend, x_RH, span, activation).forward(
            x_RH[rows], span, activation, keep_z=keep, out=out, factor_R=factor
        )
        zs.append(z_RF)
    return done_RH if y_RH is None else y_RH, zs


def backward(
    grad_RH: torch.Tensor,
    x_RH: torch.Tensor | None,
    zs: Sequence[torch.Tensor | None],
    spans: Sequence[Span],
    activation: Activation,
    *,
    factor_R: torch.Tensor | None = None,
    needs_rows: bool,
    needs_factor: bool = False,
    needs: Sequence[bool],
    on_rows: Callable[[torch.Tensor | None, torch.Tensor | None], None],
    backend: str = "auto",
) -> list[torch.Tensor | None]:
    """The gradients of the spans' tensors, four a span; those of the rows `[R,H]` and of the factors `[R]` go to
    `on_rows` (None where they are not needed) as soon as they are there.

    x_RH: the rows of the first spans, as far as any is needed: those of spans that train and, where z is not kept and
    has to be computed again, all. needs: of each of the spans' tensors; a seat without rows gets exact zeros.
    """
    several = needs_rows and len(spans) > 1
    dx_RH = empty(grad_RH, len(grad_RH), spans[0].w_in.shape[2]) if several else None
    dfactor_R = torch.zeros_like(factor_R) if needs_factor else None
    weights: list[Callable[[], list[torch.Tensor | None]]] = []
    for i, (span, rows) in enumerate(_rows(spans)):
        wanted = (needs_rows, *needs[4 * i : 4 * i + 4])
        if not any(wanted) and not needs_factor:
            weights.append(lambda: [None] * 4)
            continue
        done_RH, span_weights = _backend(backend, grad_RH, span, activation).backward(
            grad_RH[rows],
            x_RH[rows] if x_RH is not None and rows.stop <= len(x_RH) else None,
            zs[i],
            span,
            activation,
            wanted,
            out=dx_RH[rows] if several else None,
            factor_R=None if factor_R is None else factor_R[rows],
            out_factor=dfactor_R[rows] if needs_factor else None,
        )
        if not several:
            dx_RH = done_RH
        weights.append(span_weights)
    on_rows(dx_RH, dfactor_R)
    return [grad for span_weights in weights for grad in span_weights()]


def _rows(spans: Sequence[Span]):
    start = 0
    for span in spans:
        rows = slice(start, start + sum(span.counts))
        start = rows.stop
        yield span, rows


def serving(rows: torch.Tensor, span: Span, activation: Activation) -> list[str]:
    """The names of the back ends that compute such a span; rows: any, of its device and dtype."""
    return [name for name, backend in BACKENDS.items() if backend.serves(rows, span, activation)]


def _backend(name: str, rows: torch.Tensor, span: Span, activation: Activation):
    """The one that is asked for, if it serves these rows.

    Else: one kernel for all experts where it is a kernel, which is on CUDA. On a CPU torch's grouped product is a loop
    inside; the loops here keep everything between an expert's products in the cache and write their results into place.
    """
    if name != "auto" and BACKENDS[name].serves(rows, span, activation):
        return BACKENDS[name]
    if rows.is_cuda and experts_grouped.serves(rows, span, activation):
        return experts_grouped
    return experts_native if experts_native.serves(rows, span, activation) else experts_loop
