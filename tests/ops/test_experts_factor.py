"""Every back end of the experts with a factor for each row, against autograd of the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_dist.ops import experts_batched, experts_grouped, experts_loop, experts_native, native
from moe_dist.ops.experts_loop import Span
from moe_dist.ops.swiglu import swiglu
from tests.reference import relative_error

HIDDEN, WIDTH, SEATS = 16, 24, 6
COUNTS = [(5, 0, 40, 1), (0, 0), (), (3, 2, 1, 4, 0, 6), (7, 7, 7)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}


def interleaved(z_RF):
    """An activation of its own: gates and ups interleaved."""
    return F.silu(z_RF[..., ::2]) * z_RF[..., 1::2]


BOTH = (swiglu, interleaved)


def draw(counts, dtype, bias):
    """(span, rows, factors, gradient of y), the same numbers for every dtype but for their rounding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [normal(SEATS, 2 * WIDTH, HIDDEN) / 4, normal(SEATS, HIDDEN, WIDTH) / 4]
    tensors += [normal(SEATS, 2 * WIDTH), normal(SEATS, HIDDEN)] if bias else [None, None]
    factor_R = torch.rand(sum(counts), generator=generator)
    return Span(*tensors, list(counts)), normal(sum(counts), HIDDEN), factor_R, normal(sum(counts), HIDDEN)


def wanted(span, x, factor_R, grad, activation):
    """y, z and the gradients of rows, w_in, w_out, b_in, b_out and factor, by autograd in float64."""
    leaves = [t.double().clone().requires_grad_() if t is not None else None for t in (x, *span.tensors(), factor_R)]
    x, w_in, w_out, b_in, b_out, factor_R = leaves
    outputs, inner = [x[:0]], [x.new_zeros(0, 2 * WIDTH)]
    for seat, rows in span.seats():
        z = F.linear(x[rows], w_in[seat], None if b_in is None else b_in[seat])
        y = F.linear(activation(z), w_out[seat], None if b_out is None else b_out[seat])
        inner.append(z.detach())
        outputs.append(y * factor_R[rows, None])
    y = torch.cat(outputs)
    y.backward(grad.double())
    grads = [None if t is None else torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    return y.detach(), torch.cat(inner), grads


NARROW = (torch.float32, torch.bfloat16)
CASES = [
    *((experts_loop, dtype, bias, activation) for dtype in TOLERANCE for bias in (False, True) for activation in BOTH),
    *(
        (experts_batched, dtype, bias, activation)
        for dtype in TOLERANCE
        for bias in (False, True)
        for activation in BOTH
    ),
    *((experts_grouped, dtype, bias, activation) for dtype in NARROW for bias in (False, True) for activation in BOTH),
    *((experts_native, dtype, False, swiglu) for dtype in NARROW if native.has_cpu()),
]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("backend", "dtype", "bias", "activation"), CASES)
def test_a_factor_for_each_row(backend, dtype, bias, activation, counts):
    span, x, factor_R, grad = draw(counts, dtype, bias)
    assert backend is not experts_native or experts_native.serves(x, span, activation)
    y_want, z_want, wants = wanted(span, x, factor_R, grad, activation)
    y, z = backend.forward(x, span, activation, keep_z=True, out=None, factor_R=factor_R)
    close = TOLERANCE[dtype]
    assert relative_error(y, y_want) <= close
    assert relative_error(z, z_want) <= close

    needs = (True, True, True, bias, bias)
    for kept_z in (z, None):  # None: computed again
        dfactor = torch.full_like(factor_R, float("nan"))
        options = {"factor_R": factor_R, "out_factor": dfactor}
        got_x, weights = backend.backward(grad, x, kept_z, span, activation, needs, out=None, **options)
        got = [got_x, *weights()]
        for ours, want in zip([*got, dfactor], wants, strict=True):
            assert (ours is None) == (want is None)
            if ours is not None:
                assert relative_error(ours, want) <= (max(close, 2e-7) if ours is dfactor else close)
    # of nothing but the factor, from z alone
    alone = torch.empty_like(factor_R)
    options = {"factor_R": factor_R, "out_factor": alone}
    nothing, weights = backend.backward(grad, None, z, span, activation, (False,) * 5, out=None, **options)
    assert [nothing, *weights()] == [None] * 5
    assert torch.equal(alone, dfactor)


@pytest.mark.skipif(not native.has_cpu(), reason="the native library was not built here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ones_change_no_bit(dtype):
    span, x, factor_R, grad = draw(COUNTS[0], dtype, False)
    results = []
    for factor in (None, torch.ones_like(factor_R)):
        y, z = experts_native.forward(x, span, swiglu, keep_z=True, out=None, factor_R=factor)
        needs = (True, True, True, False, False)
        dx, weights = experts_native.backward(grad, x, z, span, swiglu, needs, out=None, factor_R=factor)
        results.append([y, z, dx, *weights()[:2]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
