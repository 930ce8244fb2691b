"""permute and unpermute against loops in float64, on the native kernels and on plain torch."""

import itertools

import pytest
import torch

from moe_dist.ops import native, passes, permute, permute_rows, row_plan, unpermute
from tests.ops.cases import ROUTINGS, draw_ids, oracle, relative_error, sorted_slots


@pytest.fixture(params=["cpp", "torch"])
def backend(request, monkeypatch):
    """Run a test on each of the two CPU implementations."""
    if request.param == "torch":
        monkeypatch.setattr(native, "has_cpu", lambda: False)
    elif not native.has_cpu():
        pytest.skip(native.status())
    assert passes.backend() == request.param
    return request.param


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_row_plan_is_a_stable_sort(backend, routing, dtype):
    tokens, k, experts, kind = ROUTINGS[routing]
    ids_TK = draw_ids(tokens, k, experts, kind).to(dtype)
    plan = row_plan(ids_TK, num_experts=experts)
    slots = sorted_slots(ids_TK)

    assert plan.slot_of_row_N.tolist() == slots
    assert plan.slot_of_row_N.dtype == plan.row_of_slot_TK.dtype == torch.int32
    rows = torch.full((tokens * k,), -1, dtype=torch.int32)
    rows[slots] = torch.arange(len(slots), dtype=torch.int32)
    assert torch.equal(plan.row_of_slot_TK, rows.view(tokens, k))
    assert plan.counts_E.dtype == torch.int64
    assert plan.counts_E.tolist() == [int((ids_TK == e).sum()) for e in range(experts)]
    assert (plan.num_rows, plan.num_dropped) == (len(slots), tokens * k - len(slots))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("align", [2, 16, 100])
def test_aligned_rows_are_the_same_rows_further_apart(backend, routing, align):
    tokens, k, experts, kind = ROUTINGS[routing]
    ids_TK = draw_ids(tokens, k, experts, kind)
    plain, plan = row_plan(ids_TK, num_experts=experts), row_plan(ids_TK, num_experts=experts, align=align)
    starts, counts = plan.starts_E.tolist(), plan.counts_E.tolist()
    assert torch.equal(plan.counts_E, plain.counts_E)
    assert plan.num_dropped == plain.num_dropped
    assert all(start % align == 0 for start in [*starts, plan.num_rows])
    assert plan.num_rows == sum(-(-count // align) * align for count in counts)
    real = torch.zeros(plan.num_rows, dtype=torch.bool)
    for start, count in zip(starts, counts, strict=True):
        real[start : start + count] = True
    assert torch.equal(plan.slot_of_row_N >= 0, real)
    assert torch.equal(plan.slot_of_row_N[real], plain.slot_of_row_N)
    kept = plan.row_of_slot_TK >= 0
    assert torch.equal(kept, ids_TK >= 0)
    slots = torch.arange(tokens * k, dtype=torch.int32).view(tokens, k)
    assert torch.equal(plan.slot_of_row_N[plan.row_of_slot_TK[kept].long()], slots[kept])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pad_rows_are_zeros_and_never_read(backend, routing, dtype):
    tokens, k, experts, kind = ROUTINGS[routing]
    ids_TK = draw_ids(tokens, k, experts, kind)
    plain, plan = row_plan(ids_TK, num_experts=experts), row_plan(ids_TK, num_experts=experts, align=8)
    real = plan.slot_of_row_N >= 0
    x_TH, dy_TH, probs_TK = torch.randn(tokens, 70), torch.randn(tokens, 70), torch.rand(tokens, k)

    def garbage(dtype):
        return torch.full((plan.num_rows, 70), float("nan"), dtype=dtype)

    rows_NH = passes.permute(x_TH, plan, out=garbage(dtype))
    assert torch.equal(rows_NH[real], passes.permute(x_TH, plain, dtype=dtype))
    assert torch.equal(rows_NH[~real], torch.zeros(int((~real).sum()), 70, dtype=dtype))
    rows_NH[~real] = float("nan")
    y_TH = passes.unpermute(rows_NH, plan, probs_TK, dtype=torch.float32)
    assert torch.equal(y_TH, passes.unpermute(rows_NH[real], plain, probs_TK, dtype=torch.float32))
    drows, dprobs = passes.unpermute_backward(dy_TH, plan, probs_TK=probs_TK, rows_NH=rows_NH, out=garbage(dtype))
    want = passes.unpermute_backward(dy_TH, plain, probs_TK=probs_TK, rows_NH=rows_NH[real], dtype=dtype)
    assert torch.equal(drows[real], want[0])
    assert not drows[~real].any()
    assert torch.equal(dprobs, want[1])


def test_autograd_through_aligned_rows(backend):
    ids_TK = draw_ids(41, 4, 8, "dropped")
    results = []
    for align in (1, 16):
        torch.manual_seed(0)
        x_TH, probs_TK = torch.randn(41, 30, requires_grad=True), torch.rand(41, 4, requires_grad=True)
        rows_NH, plan = permute(x_TH, ids_TK, num_experts=8, align=align)
        y_TH = unpermute(rows_NH.exp(), plan, probs_TK)  # pad rows: exp(0), which must not count
        y_TH.backward(torch.randn(41, 30))
        results.append((y_TH.detach(), x_TH.grad, probs_TK.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("view", ["transposed", "every other", "expanded"])
def test_row_plan_takes_ids_of_any_strides(backend, view):
    ids_TK = draw_ids(40, 4, 8, "dropped")
    strided = {
        "transposed": ids_TK.t().contiguous().t(),
        "every other": ids_TK.repeat_interleave(2, dim=1)[:, ::2],
        "expanded": ids_TK[:, :1].expand(-1, 4),
    }[view]
    assert not strided.is_contiguous()
    a, b = row_plan(strided, num_experts=8), row_plan(strided.contiguous(), num_experts=8)
    assert torch.equal(a.row_of_slot_TK, b.row_of_slot_TK)
    assert torch.equal(a.slot_of_row_N, b.slot_of_row_N)


@pytest.mark.parametrize("hidden", [1, 33, 64, 200])
@pytest.mark.parametrize("with_probs", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients_equal_the_loops(backend, routing, with_probs, hidden):
    if routing == "many slots" and hidden != 33:
        pytest.skip("one width is enough for the slow loops")
    tokens, k, experts, kind = ROUTINGS[routing]
    ids_TK = draw_ids(tokens, k, experts, kind)
    x_TH = torch.randn(tokens, hidden, requires_grad=True)
    probs_TK = torch.rand(tokens, k, requires_grad=True) if with_probs else None
    rows_NH, plan = permute(x_TH, ids_TK, num_experts=experts)
    weight_NH = torch.randn(rows_NH.shape, requires_grad=True)
    dy_TH = torch.randn(tokens, hidden)
    y_TH = unpermute(rows_NH * weight_NH, plan, probs_TK)
    y_TH.backward(dy_TH)

    want = oracle(x_TH.detach(), ids_TK, probs_TK, weight_NH.detach(), dy_TH)
    assert torch.equal(rows_NH.detach().double(), want["rows"])
    got = {"y": y_TH, "dx": x_TH.grad, "dweight": weight_NH.grad}
    if with_probs:
        got["dprobs"] = probs_TK.grad
    for name, value in got.items():
        assert relative_error(value, want[name]) < 4e-7, name
    # each expert for itself: an error in a small expert must not drown in a large one
    bounds = [0, *plan.counts_E.cumsum(0).tolist()]
    for begin, end in itertools.pairwise(bounds):
        assert relative_error(weight_NH.grad[begin:end], want["dweight"][begin:end]) < 4e-7


@pytest.mark.parametrize("hidden", [1, 6, 32, 100])
def test_bfloat16_is_rounded_once(backend, hidden):
    tokens, k, experts = 60, 4, 8
    ids_TK = draw_ids(tokens, k, experts, "dropped")
    x_TH = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    probs_TK = torch.rand(tokens, k, requires_grad=True)
    rows_NH, plan = permute(x_TH, ids_TK, num_experts=experts)
    dy_TH = torch.randn(tokens, hidden).bfloat16()
    y_TH = unpermute(rows_NH, plan, probs_TK)
    y_TH.backward(dy_TH)

    want = oracle(x_TH.detach(), ids_TK, probs_TK, torch.ones(rows_NH.shape), dy_TH)
    assert rows_NH.dtype == y_TH.dtype == x_TH.grad.dtype == torch.bfloat16
    assert torch.equal(rows_NH.detach().double(), want["rows"])
    # one rounding: half a unit in the last of 8 bits, and an fp32 sum's error before it
    torch.testing.assert_close(y_TH.detach().double(), want["y"], rtol=2**-8, atol=1e-6)
    assert relative_error(x_TH.grad, want["dx"]) < 2**-8  # rounded twice: each row's gradient, then their sum
    assert relative_error(probs_TK.grad, want["dprobs"]) < 4e-7


@pytest.mark.parametrize("hidden", [1, 31, 64, 100, 129])
@pytest.mark.parametrize(("wide", "narrow"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_casts_on_the_way(backend, wide, narrow, hidden):
    """`wide` outside, `narrow` between permute and unpermute: forward and backward, each rounded once."""
    tokens, k, experts = 60, 4, 8
    ids_TK = draw_ids(tokens, k, experts, "dropped")
    x_TH = torch.randn(tokens, hidden).to(wide).requires_grad_()
    probs_TK = torch.rand(tokens, k, requires_grad=True)
    rows_NH, plan = permute(x_TH, ids_TK, num_experts=experts, dtype=narrow)
    y_TH = unpermute(rows_NH, plan, probs_TK, dtype=wide)
    dy_TH = torch.randn(tokens, hidden).to(wide)
    y_TH.backward(dy_TH)

    assert (rows_NH.dtype, y_TH.dtype, x_TH.grad.dtype) == (narrow, wide, wide)
    assert torch.equal(rows_NH, permute_rows(x_TH.detach().to(narrow), plan))
    given = rows_NH.detach().double()
    want = oracle(x_TH.detach(), ids_TK, probs_TK, torch.ones(rows_NH.shape), dy_TH)
    want_y, want_dprobs = torch.zeros_like(want["y"]), torch.zeros_like(want["dprobs"])
    drows = torch.zeros_like(given)
    for row, slot in enumerate(plan.slot_of_row_N.tolist()):
        t, j = divmod(slot, k)
        want_y[t] += probs_TK[t, j].double() * given[row]
        want_dprobs[t, j] = dy_TH[t].double() @ given[row]
        drows[row] = (probs_TK[t, j] * dy_TH[t].float()).to(narrow).double()
    want_dx = torch.zeros_like(want["dx"]).index_add_(0, plan.slot_of_row_N.long() // k, drows)
    once = 2**-8 if wide == torch.bfloat16 else 4e-7
    torch.testing.assert_close(y_TH.detach().double(), want_y, rtol=once, atol=1e-6)
    torch.testing.assert_close(x_TH.grad.double(), want_dx, rtol=once, atol=1e-6)
    assert relative_error(probs_TK.grad, want_dprobs) < 4e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_casts_to_dtypes_that_no_kernel_knows(backend, dtype):
    x_TH, ids_TK = torch.randn(6, 8, requires_grad=True), draw_ids(6, 2, 4, "distinct")
    rows_NH, plan = permute(x_TH, ids_TK, num_experts=4, dtype=dtype, align=4)
    y_TH = unpermute(rows_NH, plan, dtype=torch.float32)
    y_TH.sum().backward()
    assert (rows_NH.dtype, y_TH.dtype, x_TH.grad.dtype) == (dtype, torch.float32, torch.float32)
    torch.testing.assert_close(y_TH, 2 * x_TH.detach().to(dtype).float())
    assert torch.equal(x_TH.grad, torch.full((6, 8), 2.0))


@pytest.mark.parametrize("kind", ["distinct", "dropped", "hot"])
def test_gradcheck(kind):
    ids_TK = draw_ids(7, 3, 5, kind)
    x_TH = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    probs_TK = torch.rand(7, 3, dtype=torch.float64, requires_grad=True)

    def layer(x_TH, probs_TK):
        rows_NH, plan = permute(x_TH, ids_TK, num_experts=5)
        return unpermute(rows_NH.square(), plan, probs_TK)

    assert torch.autograd.gradcheck(layer, (x_TH, probs_TK))


def test_finite_differences_of_the_native_kernels():
    """The float64 gradcheck takes the torch path; this one asks the fp32 kernels themselves."""
    if not native.has_cpu():
        pytest.skip(native.status())
    ids_TK = draw_ids(30, 3, 6, "dropped")
    x_TH, probs_TK = torch.randn(30, 40, requires_grad=True), torch.rand(30, 3, requires_grad=True)
    dx_TH, dprobs_TK, dy_TH = torch.randn(30, 40), torch.randn(30, 3), torch.randn(30, 40)
    rows_NH, plan = permute(x_TH, ids_TK, num_experts=6)
    unpermute(rows_NH, plan, probs_TK).backward(dy_TH)

    def objective(step):  # bilinear in x and probs: a central difference has no error but rounding
        with torch.no_grad():
            rows_NH = permute_rows(x_TH + step * dx_TH, plan)
            return float((unpermute(rows_NH, plan, probs_TK + step * dprobs_TK).double() * dy_TH.double()).sum())

    analytic = float((x_TH.grad.double() * dx_TH).sum() + (probs_TK.grad.double() * dprobs_TK).sum())
    assert abs((objective(0.5) - objective(-0.5)) - analytic) < 1e-5 * max(1.0, abs(analytic))


@pytest.mark.parametrize("shape", [(0, 2, 8), (5, 2, 0)])
def test_empty_batches_have_gradients(backend, shape):
    tokens, k, hidden = shape
    x_TH = torch.randn(tokens, hidden, requires_grad=True)
    probs_TK = torch.rand(tokens, k, requires_grad=True)
    rows_NH, plan = permute(x_TH, torch.zeros(tokens, k, dtype=torch.int64), num_experts=4)
    y_TH = unpermute(rows_NH, plan, probs_TK)
    y_TH.sum().backward()
    assert rows_NH.shape == (tokens * k, hidden)
    assert y_TH.shape == x_TH.grad.shape == (tokens, hidden)
    assert torch.equal(probs_TK.grad, torch.zeros(tokens, k))


def test_a_dropped_slot_adds_nothing_whatever_its_probability(backend):
    ids_TK = torch.tensor([[0, -1], [-1, -1], [1, 0]])
    probs_TK = torch.tensor([[0.5, float("nan")], [float("inf"), float("nan")], [0.25, 0.75]], requires_grad=True)
    x_TH = torch.randn(3, 70, requires_grad=True)
    rows_NH, plan = permute(x_TH, ids_TK, num_experts=2)
    y_TH = unpermute(rows_NH, plan, probs_TK)
    y_TH.sum().backward()
    assert torch.equal(y_TH[1], torch.zeros(70))
    assert torch.equal(x_TH.grad[1], torch.zeros(70))
    assert torch.isfinite(y_TH).all()
    assert torch.equal(probs_TK.grad[ids_TK < 0], torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("probs_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept(backend, dtype, probs_dtype):
    x_TH = torch.randn(6, 8).to(dtype).requires_grad_()
    probs_TK = torch.rand(6, 2).to(probs_dtype).requires_grad_()
    rows_NH, plan = permute(x_TH, draw_ids(6, 2, 4, "distinct"), num_experts=4)
    y_TH = unpermute(rows_NH, plan, probs_TK)
    y_TH.sum().backward()
    assert rows_NH.dtype == y_TH.dtype == x_TH.grad.dtype == dtype
    assert probs_TK.grad.dtype == probs_dtype
    want = x_TH.detach().double() * probs_TK.detach().double().sum(1, keepdim=True)
    assert relative_error(y_TH.detach(), want) < {torch.float32: 1e-6, torch.float64: 1e-6}.get(dtype, 5e-3)


@pytest.mark.parametrize("view", ["columns", "rows", "transposed", "expanded"])
def test_inputs_of_any_strides(backend, view):
    base = torch.randn(40, 80)
    strided = {
        "columns": base[:, 7:47],
        "rows": base[::2, :40],
        "transposed": torch.randn(40, 20).t(),
        "expanded": torch.randn(1, 40).expand(20, 40),
    }[view][:20]
    ids_TK = draw_ids(20, 3, 5, "distinct")
    probs_TK = torch.rand(3, 20).t()
    rows_NH, plan = permute(strided, ids_TK, num_experts=5)
    assert torch.equal(rows_NH, permute_rows(strided.contiguous(), plan))
    wide = torch.randn(rows_NH.shape[0], 2 * rows_NH.shape[1])[:, ::2]
    assert torch.equal(unpermute(wide, plan, probs_TK), unpermute(wide.contiguous(), plan, probs_TK.contiguous()))


def test_a_frozen_router_keeps_no_rows(backend):
    rows_NH, plan = permute(torch.randn(6, 8), draw_ids(6, 2, 4, "distinct"), num_experts=4)
    rows_NH.requires_grad_()
    probs_TK = torch.rand(6, 2)
    assert unpermute(rows_NH, plan, probs_TK).grad_fn.saved_tensors[0] is None
    assert unpermute(rows_NH, plan, probs_TK.requires_grad_()).grad_fn.saved_tensors[0] is not None


def test_a_known_number_of_rows_is_checked(backend):
    ids_TK = draw_ids(10, 2, 4, "distinct")
    assert row_plan(ids_TK, num_experts=4, num_rows=20).num_rows == 20
    with pytest.raises(ValueError, match="num_rows is 19, but 20 expert ids are not negative"):
        row_plan(ids_TK, num_experts=4, num_rows=19)
    with pytest.raises(ValueError, match="num_rows must lie in"):
        row_plan(ids_TK, num_experts=4, num_rows=21)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_id_out_of_range_is_named(backend, dtype):
    ids_TK = torch.tensor([[0, 1], [7, 2]], dtype=dtype)
    with pytest.raises(ValueError, match="expert id 7 in a layer of 4 experts"):
        row_plan(ids_TK, num_experts=4)


def test_wrong_arguments_are_refused(backend):
    ids_TK = torch.zeros(4, 2, dtype=torch.int64)
    for bad in (ids_TK.float(), ids_TK.view(-1), ids_TK.short()):
        with pytest.raises(ValueError, match="expert ids must be"):
            row_plan(bad, num_experts=2)
    with pytest.raises(ValueError, match="num_experts must be at least 1"):
        row_plan(ids_TK, num_experts=0)
    with pytest.raises(ValueError, match="align must be at least 1"):
        row_plan(ids_TK, num_experts=2, align=0)
    plan = row_plan(ids_TK, num_experts=2)
    with pytest.raises(ValueError, match=r"x must be .* \[4, hidden\]"):
        permute_rows(torch.randn(5, 3), plan)
    with pytest.raises(ValueError, match=r"rows must be .* \[8, hidden\]"):
        unpermute(torch.randn(7, 3), plan)
    with pytest.raises(ValueError, match=r"probs must be .* \[4, 2\]"):
        unpermute(torch.randn(8, 3), plan, torch.rand(2, 4))
    with pytest.raises(ValueError, match="probs must be floating point"):
        unpermute(torch.randn(8, 3), plan, torch.ones(4, 2, dtype=torch.int64))


def test_more_slots_than_row_numbers_are_refused():
    ids_TK = torch.zeros(1, 1, dtype=torch.int64).expand(2**30, 2)  # a view: no memory behind it
    with pytest.raises(ValueError, match="do not fit into 32-bit row numbers"):
        row_plan(ids_TK, num_experts=1)
    with pytest.raises(ValueError, match="do not fit into 32-bit row numbers"):
        row_plan(ids_TK[:1], num_experts=2**20, align=2**12)
