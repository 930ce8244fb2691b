"""The mixture on one rank against a loop over experts: outputs, every gradient, what is kept for the backward."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from moe_dist.moe.dispatch import DispatchPlan, stay_here
from moe_dist.moe.hop import slots_of
from moe_dist.moe.mixture import How, mixture
from moe_dist.ops import experts_batched, experts_grouped, experts_loop, experts_native, native
from moe_dist.ops.grouped_mlp import Span, swiglu
from tests.reference import relative_error

HIDDEN, WIDTH = 8, 6


def clamped(z_RF):
    """An activation of its own, as gpt-oss has one: gates and ups interleaved, clamped."""
    gate, up = z_RF[..., ::2].clamp(max=1.0), z_RF[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def interleaved(z_RF):
    """Gates and ups interleaved, and smooth: no rounding of z can jump over an edge."""
    return F.silu(z_RF[..., ::2]) * z_RF[..., 1::2]


def squared(z_RF):
    """A family without a gate: F = I."""
    return F.relu(z_RF).square()


@dataclass(frozen=True)
class Case:
    """Rows of each seat of a span that trains and of one that is frozen (None: no such span), and the options."""

    train: tuple[int, ...] | None = (5, 0, 3)
    frozen: tuple[int, ...] | None = None
    pad_seats: int = 0
    activation: object = swiglu
    bias: bool = False
    recompute: bool = False
    rows_need_grad: bool = True

    @property
    def inner(self):
        return WIDTH if self.activation is squared else 2 * WIDTH


CASES = {
    "plain": Case(),
    "bias": Case(bias=True),
    "recompute": Case(recompute=True, bias=True),
    "both spans": Case(train=(2, 4), frozen=(3, 0, 6)),
    "both spans, recompute": Case(train=(2, 4), frozen=(3, 0, 6), recompute=True),
    "frozen only": Case(train=None, frozen=(3, 0, 6)),
    "pad seats": Case(train=(2, 1), pad_seats=2, bias=True),
    "no rows": Case(train=(0, 0), frozen=(0,), bias=True),
    "lowest layer": Case(train=(2, 4), frozen=(3, 1), rows_need_grad=False),
    "own activation": Case(activation=clamped, bias=True),
    "own activation, recompute": Case(activation=clamped, train=(4,), frozen=(3, 2), recompute=True),
    "smooth activation": Case(activation=interleaved),
    "no gate": Case(activation=squared),
}


def problem(case: Case, dtype=torch.float64, hidden=HIDDEN):
    """(rows, spans, gradient of the output), drawn alike for every dtype."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    spans = []
    for counts, trains in ((case.train, True), (case.frozen, False)):
        if counts is None:
            continue
        seats = len(counts) + case.pad_seats
        shapes = [(seats, case.inner, hidden), (seats, hidden, WIDTH)]
        shapes += [(seats, case.inner), (seats, hidden)] if case.bias else []
        tensors = [draw(*shape).requires_grad_(trains) for shape in shapes]
        spans.append(Span(*(tensors + [None] * (4 - len(tensors))), list(counts)))
    rows = sum(sum(span.counts) for span in spans)
    return draw(rows, hidden).requires_grad_(case.rows_need_grad), spans, draw(rows, hidden)


def run(x, spans, *, activation, recompute=False):
    """The mixture of rows that each go to one seat with probability 1, and lie seat after seat already."""
    counts = [count for span in spans for count in span.counts]
    seats_R1 = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
    ones_R1 = torch.ones(seats_R1.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    part = stay_here(slots_of(seats_R1, ones_R1), len(counts))
    how = How(activation, tuple(len(span.counts) for span in spans), x.dtype, recompute)
    return mixture(x, ones_R1, DispatchPlan([part], part.seats.counts_E), how, [span.tensors() for span in spans])


def loop(x, spans, activation):
    outputs, start = [x[:0] * 0], 0
    for span in spans:
        for seat, count in enumerate(span.counts):
            rows = x[start : start + count]
            start += count
            z = F.linear(rows, span.w_in[seat], None if span.b_in is None else span.b_in[seat])
            outputs.append(F.linear(activation(z), span.w_out[seat], None if span.b_out is None else span.b_out[seat]))
    return torch.cat(outputs)


def gradients(x, spans):
    """(what, gradient) of everything that has one; a leaf that was not reached counts as zeros."""
    leaves = [("rows", x)] if x.requires_grad else []
    for i, span in enumerate(spans):
        names = ("w_in", "w_out", "b_in", "b_out")
        leaves += [((i, n), t) for n, t in zip(names, span.tensors(), strict=True) if t is not None and t.requires_grad]
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_against_a_loop(name, dtype, tolerance):
    case = CASES[name]
    x, spans, grad = problem(case, dtype)
    y = run(x, spans, activation=case.activation, recompute=case.recompute)
    if y.requires_grad:
        y.backward(grad)
    wide_x, wide_spans, wide_grad = problem(case)
    expected = loop(wide_x, wide_spans, case.activation)
    expected.backward(wide_grad)
    assert relative_error(y.detach(), expected.detach()) <= tolerance
    ours, theirs = gradients(x, spans), gradients(wide_x, wide_spans)
    assert ours.keys() == theirs.keys()
    for what, value in theirs.items():
        assert relative_error(ours[what], value) <= tolerance, what
    for span in spans[1:] if case.train is not None else spans:
        assert all(tensor.grad is None for tensor in span.tensors() if tensor is not None)


@pytest.mark.parametrize("name", ["plain", "bias", "recompute", "both spans", "own activation", "no gate"])
def test_gradcheck(name):
    case = CASES[name]
    x, spans, _ = problem(case)
    counts = [span.counts for span in spans]
    leaves = [tensor for span in spans for tensor in span.tensors()]

    def rebuilt(x, *tensors):
        spans = [Span(*tensors[4 * i : 4 * i + 4], held) for i, held in enumerate(counts)]
        return run(x, spans, activation=case.activation, recompute=case.recompute)

    assert torch.autograd.gradcheck(rebuilt, (x, *leaves))


@pytest.mark.parametrize("name", ["plain", "pad seats", "no rows"])
def test_a_seat_without_rows_gets_exact_zeros(name):
    case = CASES[name]
    x, spans, grad = problem(case)
    run(x, spans, activation=case.activation).backward(grad)
    for tensor in spans[0].tensors():
        for seat in range(len(tensor) if tensor is not None else 0):
            used = seat < len(spans[0].counts) and spans[0].counts[seat] > 0
            assert tensor.grad[seat].any() == used
            assert not torch.isnan(tensor.grad[seat]).any()


def kept(case: Case) -> set[tuple[int, ...]]:
    """Shapes that the backward keeps, besides the weights."""
    x, spans, _ = problem(case)
    weights = {tensor.data_ptr() for span in spans for tensor in span.tensors() if tensor is not None}
    shapes = set()

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x, spans, activation=case.activation, recompute=case.recompute)
    return shapes


def test_what_the_backward_keeps():
    inner = 2 * WIDTH
    assert kept(Case(train=(4, 3))) == {(7, HIDDEN), (7, inner)}
    assert kept(Case(train=(4, 3), recompute=True)) == {(7, HIDDEN)}
    assert kept(Case(train=None, frozen=(4, 3))) == {(7, inner)}  # an input gradient needs z, never the rows
    assert kept(Case(train=None, frozen=(4, 3), recompute=True)) == {(7, HIDDEN)}
    assert kept(Case(train=None, frozen=(4, 3), rows_need_grad=False)) == set()
    assert kept(Case(train=(2,), frozen=(5,), rows_need_grad=False)) == {(2, HIDDEN), (2, inner)}


def test_rows_of_frozen_experts_are_not_kept_by_what_is_kept():
    """A view of the trainable experts' rows would hold on to the memory of all rows."""
    for train, rows in ((2, 2), (4, 4)):
        x, spans, _ = problem(Case(train=(train,), frozen=(7 - train,)))
        kept_bytes = set()

        def pack(tensor, kept_bytes=kept_bytes):
            if tensor.shape[1:] == (HIDDEN,):
                kept_bytes.add(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(x, spans, activation=swiglu)
        assert kept_bytes == {rows * HIDDEN * x.element_size()}


def test_recompute_changes_no_bit():
    results = []
    for recompute in (False, True):
        x, spans, grad = problem(CASES["both spans"], torch.float32)
        y = run(x, spans, activation=swiglu, recompute=recompute)
        y.backward(grad)
        results.append([y.detach(), *gradients(x, spans).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["both spans", "bias", "smooth activation"])
def test_bf16_per_expert_against_float64(name):
    """Weights and rows are the same bf16 numbers on both sides, so what is left is the arithmetic's rounding."""
    case, hidden = CASES[name], 64
    x, spans, grad = problem(case, torch.bfloat16, hidden)
    wide_x = x.detach().double().requires_grad_()
    wide_spans = [
        Span(*(t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in s.tensors()), s.counts)
        for s in spans
    ]
    y = run(x, spans, activation=case.activation)
    y.backward(grad)
    expected = loop(wide_x, wide_spans, case.activation)
    expected.backward(grad.double())
    start = 0
    for count in [count for span in spans for count in span.counts]:
        rows = slice(start, start + count)
        start += count
        assert relative_error(y[rows].detach(), expected[rows].detach()) < 6e-3
        assert relative_error(x.grad[rows], wide_x.grad[rows]) < 8e-3
    theirs = gradients(wide_x, wide_spans)
    for what, value in gradients(x, spans).items():
        for seat in range(len(value)) if what != "rows" else ():
            assert relative_error(value[seat], theirs[what][seat]) < 8e-3, (what, seat)


def test_inference_keeps_nothing_and_a_second_derivative_is_refused():
    x, spans, _ = problem(CASES["plain"])
    with torch.no_grad():
        assert not run(x, spans, activation=swiglu).requires_grad
    y = run(x, spans, activation=swiglu)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def every_result(backend, span, x, grad, activation):
    """What a back end gives for every choice of what is kept, asked for, and where it goes."""
    biases = span.b_in is not None
    y, z = backend.forward(x, span, activation, keep_z=True, out=None)
    again, none = backend.forward(x, span, activation, keep_z=False, out=torch.empty_like(x))
    place = x.clone()
    got_x, weights = backend.backward(grad, x, z, span, activation, (True, True, True, biases, biases), out=place)
    no_x, part = backend.backward(grad, x, None, span, activation, (False, True, False, False, False), out=None)
    w_in, *others = part()
    assert none is no_x is None
    assert got_x is place
    assert others == [None] * 3
    return [y, z, again, w_in, got_x, *(tensor for tensor in weights() if tensor is not None)]


def draw_span(counts, dtype, *, width, bias):
    """A span of 8 seats, of which `counts` have experts, and rows with their gradient."""
    torch.manual_seed(0)
    tensors = [torch.randn(8, 2 * width, 16), torch.randn(8, 16, width)]
    tensors += [torch.randn(8, 2 * width), torch.randn(8, 16)] if bias else []
    span = Span(*[tensor.to(dtype) for tensor in tensors] + [None] * (4 - len(tensors)), list(counts))
    return span, *torch.randn(2, sum(counts), 16).to(dtype)


COUNTS = [(3,), (40, 1, 0, 2), (7, 9, 8, 0, 6, 7, 9), (0, 0), ()]
CLOSE = {torch.float32: 3e-7, torch.bfloat16: 6e-3}


@pytest.mark.skipif(not native.has_cpu(), reason="the native library was not built here")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", CLOSE)
def test_threads_over_experts_against_one_after_the_other(counts, threads, dtype):
    """Every split of experts over threads, hot experts among them: the same products as the plain loop's."""
    span, x, grad = draw_span(counts, dtype, width=11, bias=False)
    assert experts_native.serves(x, span, swiglu)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = [every_result(backend, span, x, grad, swiglu) for backend in (experts_native, experts_loop)]
    finally:
        torch.set_num_threads(before)
    for ours, plain in zip(*results, strict=True):
        assert relative_error(ours, plain) <= CLOSE[dtype]


@pytest.mark.skipif(not native.has_cpu(), reason="the native library was not built here")
@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("dtype", CLOSE)
def test_no_expert_sees_the_rows_of_another(dtype, bad):
    """bf16 products are padded with whatever rows come next: that must not show, not even where those are NaN."""
    counts = (40, 17, 3, 33)
    span, x, grad = draw_span(counts, dtype, width=11, bias=False)
    start = sum(counts[:bad])
    results = []
    for value in (1.0, float("nan")):
        for rows in (x, grad):
            rows[start : start + counts[bad]] = value
        results.append(every_result(experts_native, span, x, grad, swiglu))
    for fine, spoilt in zip(*results, strict=True):
        parts = [(tensor.split(counts) if len(tensor) == len(x) else tensor.unbind()) for tensor in (fine, spoilt)]
        for expert, (a, b) in enumerate(zip(*parts, strict=True)):
            assert expert == bad or torch.equal(a, b), expert


@pytest.mark.skipif(not native.has_cpu(), reason="the native library was not built here")
def test_bf16_products_have_few_shapes():
    """torch generates code for each shape of a bf16 product, which takes ten times as long as a small product."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        for count in range(1, 200, 3):
            span, x, grad = draw_span((count,), torch.bfloat16, width=8, bias=False)
            every_result(experts_native, span, x, grad, swiglu)
    shapes = [event.input_shapes for event in profiler.events() if event.name == "aten::mm"]
    assert len(shapes) >= 10 * 67
    assert {left[0] for left, right, _ in shapes if right == [16, 16]} == set(range(16, 209, 16))
    assert len({str(shape) for shape in shapes}) <= 6 * 13


@pytest.mark.parametrize("activation", [swiglu, interleaved])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("backend", [experts_grouped, experts_batched])
def test_one_product_for_all_experts_against_one_after_the_other(backend, counts, dtype, activation):
    """The back end of CUDA on the CPU, where torch's grouped product runs too, and the batched one."""
    span, x, grad = draw_span(counts, dtype, width=8, bias=True)
    ours, plain = [every_result(each, span, x, grad, activation) for each in (backend, experts_loop)]
    for one, other in zip(ours, plain, strict=True):
        assert relative_error(one, other) <= 2 * CLOSE[dtype]
