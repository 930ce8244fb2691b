"""The products of a span of experts, one expert after the other: the back end of the grouped MLP for everything that
no other back end serves, and their reference.

What lies between an expert's products (z where it is not kept, the activation, their gradients) lives in a scratch
buffer of one expert's rows, which stays in the cache and is allocated once a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moe_dist.ops.memory import empty
from moe_dist.ops.swiglu import swiglu, swiglu_backward, swiglu_forward

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Span:
    """One stack of experts: w_in `[S,F,H]`, w_out `[S,H,I]`, biases `[S,F]` and `[S,H]` or None.

    `counts`: rows of each of the first `len(counts)` seats, in order; later seats get none. `counts_S`: the same as
    int64 on the device of the rows, where they are there already; a back end that reads them there never waits.
    """

    w_in: torch.Tensor
    w_out: torch.Tensor
    b_in: torch.Tensor | None
    b_out: torch.Tensor | None
    counts: list[int]
    counts_S: torch.Tensor | None = None

    def counts_on(self, device: torch.device) -> torch.Tensor:
        given = self.counts_S
        return torch.tensor(self.counts, dtype=torch.int64, device=device) if given is None else given

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.w_in, self.w_out, self.b_in, self.b_out

    def seats(self) -> Iterator[tuple[int, slice]]:
        """(seat, its rows) of the seats that have rows."""
        start = 0
        for seat, count in enumerate(self.counts):
            if count:
                yield seat, slice(start, start + count)
                start += count


def serves(rows: torch.Tensor, span: Span, activation: Activation) -> bool:
    """Whether this back end computes such a span: always."""
    return True


def forward(
    x_RH: torch.Tensor,
    span: Span,
    activation: Activation,
    *,
    keep_z: bool,
    out: torch.Tensor | None,
    factor_R: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y `[R,H]`, in `out` if given; z `[R,F]` if it is to be kept).

    factor_R: fp32 `[R]`, multiplies each row's y: applied to the activation and to b_out. None: ones.
    """
    out, out_z = prepare_forward(x_RH, span, keep_z=keep_z, out=out)
    w_in_S, w_out_S = span.w_in.unbind(), span.w_out.unbind()
    most = max(span.counts, default=0)
    z_scratch = x_RH.new_empty(most, span.w_in.shape[1]) if out_z is None else None
    a_scratch = x_RH.new_empty(most, span.w_out.shape[2])
    for seat, rows in span.seats():
        count = rows.stop - rows.start
        z_RF = z_scratch[:count] if out_z is None else out_z[rows]
        linear(x_RH[rows], w_in_S[seat], span.b_in, seat, z_RF)
        factor = None if factor_R is None else factor_R[rows]
        if activation is swiglu:
            a_RI = swiglu_forward(z_RF, factor, out=a_scratch[:count])
        else:
            a_RI = scaled(activation(z_RF), factor)
        linear(a_RI, w_out_S[seat], span.b_out, seat, out[rows], factor)
    return out, out_z


def backward(
    grad_RH: torch.Tensor,
    x_RH: torch.Tensor | None,
    z_RF: torch.Tensor | None,
    span: Span,
    activation: Activation,
    needs: Sequence[bool],
    *,
    out: torch.Tensor | None,
    factor_R: torch.Tensor | None = None,
    out_factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, Callable[[], list[torch.Tensor | None]]]:
    """(the gradient of the rows, in `out` if given; a function that gives those of w_in, w_out, b_in, b_out).

    None where `needs` says no. The function is called once, when the rows' gradients are on their way: a back end may
    compute the weights' only then. Here, where one expert's products follow each other in the cache, it does not.

    x_RH may be None where neither w_in's gradient nor z (itself None: recomputed) asks for it. `out_factor`, fp32
    `[R]`, receives the gradient of the factor, where it is given.
    """
    grad_x_RH, *grads = prepare_backward(grad_RH, span, needs, out)
    w_in_S, w_out_S = span.w_in.unbind(), span.w_out.unbind()
    most, inner, width = max(span.counts, default=0), span.w_in.shape[1], span.w_out.shape[2]
    z_scratch = grad_RH.new_empty(most, inner) if z_RF is None else None
    grad_z_scratch, a_scratch = grad_RH.new_empty(most, inner), grad_RH.new_empty(most, width)
    for seat, rows in span.seats():
        count = rows.stop - rows.start
        recompute = z_RF is None
        z = linear(x_RH[rows], w_in_S[seat], span.b_in, seat, z_scratch[:count]) if recompute else z_RF[rows]
        grad = grad_RH[rows]
        grad_a = torch.mm(grad, w_out_S[seat], out=a_scratch[:count])
        factor, grad_factor = (None if f is None else f[rows] for f in (factor_R, out_factor))
        if activation is swiglu:
            places = {"out": grad_a, "out_grad": grad_z_scratch[:count], "out_factor": grad_factor}
            a, grad_z = swiglu_backward(grad_a, z, factor, **places)
        else:
            a, grad_z = activation_backward(activation, grad_a, z, factor, out_factor=grad_factor)
        if grad_factor is not None and span.b_out is not None:
            grad_factor += wide_dots(grad, span.b_out[seat])
        if grad_x_RH is not None:
            torch.mm(grad_z, w_in_S[seat], out=grad_x_RH[rows])
        grad_w_in, grad_w_out, grad_b_in, grad_b_out = (None if g is None else g[seat] for g in grads)
        if grad_w_in is not None:
            torch.mm(grad_z.t(), x_RH[rows], out=grad_w_in)
        if grad_w_out is not None:
            torch.mm(grad.t(), a, out=grad_w_out)
        if grad_b_in is not None:
            grad_b_in.copy_(wide_sum(grad_z))
        if grad_b_out is not None:
            grad_b_out.copy_(wide_sum(grad, factor))
    return grad_x_RH, lambda: grads


def prepare_forward(
    x_RH: torch.Tensor, span: Span, *, keep_z: bool, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memory for y, unless it is there, and for z if it is to be kept."""
    out = empty(x_RH, len(x_RH), span.w_out.shape[1]) if out is None else out
    return out, empty(x_RH, len(x_RH), span.w_in.shape[1]) if keep_z else None


def prepare_backward(
    grad_RH: torch.Tensor, span: Span, needs: Sequence[bool], out: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Memory for the gradients that are needed, with zeros for the seats that have no rows."""
    if needs[0] and out is None:
        out = empty(grad_RH, len(grad_RH), span.w_in.shape[2])
    grads = [
        empty(tensor, *tensor.shape) if needed else None
        for tensor, needed in zip(span.tensors(), needs[1:], strict=True)
    ]
    idle = [seat for seat in range(len(span.w_in)) if seat >= len(span.counts) or not span.counts[seat]]
    for grad_S in grads:
        for seat in idle if grad_S is not None else ():
            grad_S[seat].zero_()
    return [out, *grads]


def linear(
    x_RA: torch.Tensor,
    w_BA: torch.Tensor,
    b_SB: torch.Tensor | None,
    seat: int,
    out: torch.Tensor,
    factor_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """x · wᵀ (+ the seat's bias, times the row's factor) into `out`."""
    if b_SB is None:
        return torch.mm(x_RA, w_BA.t(), out=out)
    if factor_R is not None:
        return torch.mm(x_RA, w_BA.t(), out=out).add_(factor_R[:, None] * b_SB[seat])
    return torch.addmm(b_SB[seat], x_RA, w_BA.t(), out=out)


def scaled(a_RI: torch.Tensor, factor_R: torch.Tensor | None) -> torch.Tensor:
    """Each row times its factor, in the dtype of the rows."""
    return a_RI if factor_R is None else (a_RI * factor_R[:, None]).to(a_RI.dtype)


def activation_backward(
    activation: Activation,
    grad_RI: torch.Tensor,
    z_RF: torch.Tensor,
    factor_R: torch.Tensor | None = None,
    *,
    out_factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`swiglu_backward` of any differentiable activation -> (the scaled activation again, the gradient of z)."""
    with torch.enable_grad():
        z_RF = z_RF.detach().requires_grad_()
        a_RI = activation(z_RF)
        (grad_RF,) = torch.autograd.grad(a_RI, z_RF, scaled(grad_RI, factor_R))
    if out_factor is not None:
        out_factor.copy_(wide_dots(grad_RI, a_RI.detach()))
    return scaled(a_RI.detach(), factor_R), grad_RF


def wide_sum(grad_RB: torch.Tensor, factor_R: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of the rows, each times its factor, in float32 or wider."""
    grad_RB = grad_RB if factor_R is None else grad_RB * factor_R[:, None]
    return grad_RB.sum(dim=0, dtype=_wide(grad_RB.dtype))


def wide_dots(a_RB: torch.Tensor, b_RB: torch.Tensor) -> torch.Tensor:
    """<a[r], b[r]> `[R]` in float32 or wider; b may be one row for all."""
    wide = _wide(a_RB.dtype)
    return (a_RB.to(wide) * b_RB.to(wide)).sum(dim=1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
