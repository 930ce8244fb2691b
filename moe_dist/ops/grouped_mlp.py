"""Grouped MLP: every expert's two products and the activation between them, over rows sorted by expert.

    z_RF = x_RH · W_in[e]ᵀ (+ b_in[e])        F = 2I: gate and up stacked (F = I where a family has no gate)
    a_RI = activation(z_RF)
    y_RH = a_RI · W_out[e]ᵀ (+ b_out[e])

The weights come as *spans*: stacks of experts of which all train or none does. A frozen span costs the backward
nothing but its input gradient: no weight gradient, no saved input. A span that trains saves its rows and z.
With `recompute` the rows are saved and z is computed again in the backward; nothing is routed or sent again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]


def swiglu(z_RF: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up for z = [gate | up]. The one activation whose backward is written out (`_swiglu_backward`)."""
    gate_RI, up_RI = z_RF.chunk(2, dim=-1)
    return F.silu(gate_RI) * up_RI


def _swiglu_backward(grad_RI: torch.Tensor, z_RF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation again and the gradient of z: silu'(g) = σ(g)·(1 + g·(1 − σ(g)))."""
    gate_RI, up_RI = z_RF.chunk(2, dim=-1)
    silu_RI = F.silu(gate_RI)
    grad_RF = torch.empty_like(z_RF)
    grad_gate_RI, grad_up_RI = grad_RF.chunk(2, dim=-1)
    torch.mul(grad_RI, silu_RI, out=grad_up_RI)
    grad_gate_RI.copy_(torch.ops.aten.silu_backward(grad_RI * up_RI, gate_RI))
    return silu_RI.mul_(up_RI), grad_RF


def _activation_backward(
    activation: Activation, grad_RI: torch.Tensor, z_RF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if activation is swiglu:
        return _swiglu_backward(grad_RI, z_RF)
    with torch.enable_grad():
        z_RF = z_RF.detach().requires_grad_()
        a_RI = activation(z_RF)
        (grad_RF,) = torch.autograd.grad(a_RI, z_RF, grad_RI)
    return a_RI.detach(), grad_RF


@dataclass(frozen=True)
class Span:
    """One stack of experts: w_in `[S,F,H]`, w_out `[S,H,I]`, biases `[S,F]` and `[S,H]` or None.

    `counts`: rows of each of the first `len(counts)` seats, in order; later seats get none.
    """

    w_in: torch.Tensor
    w_out: torch.Tensor
    b_in: torch.Tensor | None
    b_out: torch.Tensor | None
    counts: list[int]

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.w_in, self.w_out, self.b_in, self.b_out


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


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RH, counts, activation, recompute, *tensors):
        y_RH = x_RH.new_empty(len(x_RH), tensors[1].shape[1])
        needs_grad = ctx.needs_input_grad
        saved, start = [], 0
        for i, span_counts in enumerate(counts):
            w_in, w_out, b_in, b_out = tensors[4 * i : 4 * i + 4]
            rows = slice(start, start + sum(span_counts))
            start = rows.stop
            z_RF = grouped_linear(x_RH[rows], w_in, b_in, span_counts)
            grouped_linear(activation(z_RF), w_out, b_out, span_counts, out=y_RH[rows])
            trains = any(needs_grad[4 + 4 * i : 8 + 4 * i])
            saved.append(x_RH[rows] if trains or recompute else None)
            saved.append(None if recompute else z_RF)
        ctx.save_for_backward(*saved, *tensors)
        ctx.counts, ctx.activation, ctx.recompute = counts, activation, recompute
        return y_RH

    @staticmethod
    def backward(ctx, grad_y_RH):
        grad_y_RH = grad_y_RH.contiguous()
        count = len(ctx.counts)
        saved, tensors = ctx.saved_tensors[: 2 * count], ctx.saved_tensors[2 * count :]
        needs_rows = ctx.needs_input_grad[0]
        grad_x_RH = grad_y_RH.new_empty(len(grad_y_RH), tensors[0].shape[2]) if needs_rows else None
        grads, start = [], 0
        for i, span_counts in enumerate(ctx.counts):
            w_in, w_out, b_in, b_out = tensors[4 * i : 4 * i + 4]
            needs = ctx.needs_input_grad[4 + 4 * i : 8 + 4 * i]
            rows = slice(start, start + sum(span_counts))
            start = rows.stop
            if not (needs_rows or any(needs)):
                grads += [None] * 4
                continue
            x_RH, z_RF = saved[2 * i : 2 * i + 2]
            if ctx.recompute:
                z_RF = grouped_linear(x_RH, w_in, b_in, span_counts)
            g_RH = grad_y_RH[rows]
            grad_a_RI = grouped_linear(g_RH, w_out.transpose(1, 2), None, span_counts)
            a_RI, grad_z_RF = _activation_backward(ctx.activation, grad_a_RI, z_RF)
            if needs_rows:
                grouped_linear(grad_z_RF, w_in.transpose(1, 2), None, span_counts, out=grad_x_RH[rows])
            grads.append(grouped_weight_grad(grad_z_RF, x_RH, w_in, span_counts) if needs[0] else None)
            grads.append(grouped_weight_grad(g_RH, a_RI, w_out, span_counts) if needs[1] else None)
            grads.append(_grouped_bias_grad(grad_z_RF, b_in, span_counts) if needs[2] else None)
            grads.append(_grouped_bias_grad(g_RH, b_out, span_counts) if needs[3] else None)
        return grad_x_RH, None, None, None, *grads


def grouped_linear(
    x_RA: torch.Tensor,
    w_SBA: torch.Tensor,
    b_SB: torch.Tensor | None,
    counts: list[int],
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x · w[s]ᵀ (+ b[s]) for the `counts[s]` rows of each seat s. Returns `[R,B]`, written into `out` if given."""
    if out is None:
        out = x_RA.new_empty(len(x_RA), w_SBA.shape[1])
    if _use_grouped_mm(x_RA, w_SBA):
        out.copy_(
            F.grouped_mm(x_RA, w_SBA[: len(counts)].transpose(1, 2), offs=_offsets(counts, x_RA.device))
        )
        if b_SB is not None:
            out += b_SB[: len(counts)].repeat_interleave(_on(counts, out.device), dim=0, output_size=len(out))
        return out
    start = 0
    for seat, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            if b_SB is None:
                torch.mm(x_RA[rows], w_SBA[seat].t(), out=out[rows])
            else:
                torch.addmm(b_SB[seat], x_RA[rows], w_SBA[seat].t(), out=out[rows])
            start = rows.stop
    return out


def grouped_weight_grad(
    grad_RB: torch.Tensor, x_RA: torch.Tensor, w_SBA: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """grad[s]ᵀ · x[s] for each seat, in the shape of w `[S,B,A]`; exact zeros for a seat without rows."""
    if _use_grouped_mm(x_RA, w_SBA) and len(x_RA):
        held = F.grouped_mm(grad_RB.t(), x_RA, offs=_offsets(counts, x_RA.device))
        return F.pad(held, (0, 0, 0, 0, 0, len(w_SBA) - len(counts)))
    grad_SBA = torch.empty_like(w_SBA)
    start = 0
    for seat in range(len(w_SBA)):
        count = counts[seat] if seat < len(counts) else 0
        if count:
            rows = slice(start, start + count)
            torch.mm(grad_RB[rows].t(), x_RA[rows], out=grad_SBA[seat])
            start = rows.stop
        else:
            grad_SBA[seat].zero_()
    return grad_SBA


def _grouped_bias_grad(grad_RB: torch.Tensor, b_SB: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The sum of each seat's rows, summed in float32 or wider."""
    wide = torch.promote_types(grad_RB.dtype, torch.float32)
    grad_SB = torch.zeros_like(b_SB)
    start = 0
    for seat, count in enumerate(counts):
        grad_SB[seat] = grad_RB[start : start + count].sum(dim=0, dtype=wide)
        start += count
    return grad_SB


def _use_grouped_mm(x_RA: torch.Tensor, w_SBA: torch.Tensor) -> bool:
    """One kernel for all experts where it is a kernel: CUDA, bf16, strides of whole 16 bytes.

    On a CPU `grouped_mm` is a loop inside, and the loop here writes into its place without a copy.
    """
    aligned = all(size * x_RA.element_size() % 16 == 0 for size in w_SBA.shape[1:])
    return x_RA.is_cuda and x_RA.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm")


def _on(counts: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(counts, device=device)


def _offsets(counts: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).to(device=device, dtype=torch.int32)
