"""The batched back end: what pad rows must never do, and which back end computes when one is asked for by name."""

from __future__ import annotations

import pytest
import torch

from moe_dist.ops import experts_batched, experts_loop, grouped_mlp, native
from moe_dist.ops.grouped_mlp import BACKENDS, serving
from moe_dist.ops.swiglu import swiglu
from tests.ops.test_experts_factor import draw
from tests.reference import relative_error

CHEAP, DEAR = (5, 4, 5, 6, 5, 5), (5, 0, 40, 1)
NEEDS = (True, True, True, True, True)


def inverse(z_RF):
    """An activation that is infinite at zero."""
    return 1 / z_RF[..., ::2] + z_RF[..., 1::2]


def results(backend, span, x, factor_R, grad, activation):
    y, z = backend.forward(x, span, activation, keep_z=True, out=None, factor_R=factor_R)
    dfactor_R = torch.empty_like(factor_R)
    options = {"factor_R": factor_R, "out_factor": dfactor_R}
    dx, weights = backend.backward(grad, x, z, span, activation, NEEDS, out=None, **options)
    return [y, z, dx, dfactor_R, *weights()]


@pytest.mark.parametrize("counts", [CHEAP, DEAR])
def test_an_activation_that_is_infinite_at_zero(counts):
    """What a pad row's zero makes of it is never computed, nor multiplied by the pad row's zero gradient."""
    span, *rest = draw(counts, torch.float64, bias=True)
    for tensor in (span.b_in, span.b_out):
        tensor.zero_()
    ours, plain = (results(backend, span, *rest, inverse) for backend in (experts_batched, experts_loop))
    for one, other in zip(ours, plain, strict=True):
        assert torch.isfinite(one).all()
        assert relative_error(one, other) <= 1e-13


@pytest.mark.parametrize("counts", [CHEAP, DEAR, (4, 4, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_expert_sees_the_rows_of_another(counts, dtype):
    bad = 2
    span, x, factor_R, grad = draw(counts, dtype, bias=True)
    start = sum(counts[:bad])
    found = []
    for value in (1.0, float("nan")):
        for rows in (x, grad):
            rows[start : start + counts[bad]] = value
        found.append(results(experts_batched, span, x, factor_R, grad, swiglu))
    for fine, spoilt in zip(*found, strict=True):
        parts = [(tensor.split(counts) if len(tensor) == len(x) else tensor.unbind()) for tensor in (fine, spoilt)]
        for expert, (a, b) in enumerate(zip(*parts, strict=True)):
            assert expert == bad or torch.equal(a, b), expert


@pytest.mark.parametrize("counts", [CHEAP, DEAR, (4, 4, 4, 4), (0, 0), ()])
def test_idle_and_pad_seats_get_exact_zeros(counts):
    span, *rest = draw(counts, torch.float32, bias=True)
    *_, w_in, w_out, b_in, b_out = results(experts_batched, span, *rest, swiglu)
    for grad_S in (w_in, w_out, b_in, b_out):
        for seat, grad in enumerate(grad_S):
            assert grad.any() == (seat < len(counts) and counts[seat] > 0)


@pytest.mark.parametrize("counts", [CHEAP, (4, 4, 4, 4)])
def test_results_go_where_they_are_wanted(counts):
    span, x, factor_R, grad = draw(counts, torch.float32, bias=False)
    whole = torch.full((2, len(x) + 3, x.shape[1]), float("nan"))
    y_place, dx_place = whole[:, 1:-2]
    options = {"factor_R": factor_R}
    y, z = experts_batched.forward(x, span, swiglu, keep_z=True, out=y_place, **options)
    dx, _ = experts_batched.backward(grad, x, z, span, swiglu, (True,) + (False,) * 4, out=dx_place, **options)
    assert y is y_place
    assert dx is dx_place
    assert torch.equal(torch.stack([y, dx]).isnan().any(), torch.tensor(False))
    assert whole[:, [0, -2, -1]].isnan().all()


def test_it_serves_where_padding_is_cheap():
    for counts, serves in ((CHEAP, True), (DEAR, False), ((4, 5), True), ((4, 7), False), ((), True), ((0, 0), True)):
        span, x, *_ = draw(counts, torch.float32, bias=True)
        assert experts_batched.serves(x, span, swiglu) == serves, counts


def noting(function, what, called: list):
    def noted(*args, **options):
        called.append(what)
        return function(*args, **options)

    return noted


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("counts", [CHEAP, DEAR])
def test_the_one_that_is_asked_for_computes_where_it_serves(monkeypatch, name, counts):
    called = []
    for other, module in BACKENDS.items():
        for way in ("forward", "backward"):
            monkeypatch.setattr(module, way, noting(getattr(module, way), (other, way), called))
    span, x, factor_R, grad = draw(counts, torch.float32, bias=False)
    _, zs = grouped_mlp.forward(x, [span], swiglu, factor_R=factor_R, keep_z=[True], backend=name)
    options = {"needs_rows": True, "needs": (True, True, False, False), "on_rows": lambda dx, dfactor: None}
    grouped_mlp.backward(grad, x, zs, [span], swiglu, factor_R=factor_R, backend=name, **options)
    usual = "native" if native.has_cpu() else "loop"
    used = name if name in serving(x, span, swiglu) else usual
    assert called == [(used, "forward"), (used, "backward")]
    assert ("batched" in serving(x, span, swiglu)) == (counts == CHEAP)


def test_what_serves_depends_on_dtype_activation_and_bias():
    def names(dtype, bias, activation):
        span, x, *_ = draw(CHEAP, dtype, bias)
        return set(serving(x, span, activation))

    ours = {"native"} if native.has_cpu() else set()
    assert names(torch.float32, False, swiglu) == {"loop", "grouped", "batched"} | ours
    assert names(torch.bfloat16, False, swiglu) == {"loop", "grouped", "batched"} | ours
    assert names(torch.float64, False, swiglu) == {"loop", "batched"}
    assert names(torch.float32, True, swiglu) == {"loop", "grouped", "batched"}
    assert names(torch.float32, False, inverse) == {"loop", "grouped", "batched"}
