"""The CUDA kernels on a GPU, against the plain torch reference on the same device."""

import pytest
import torch

from moe_dist.ops import RowPlan, native, passes, permute, reference, row_plan, unpermute
from tests.ops.cases import ROUTINGS, draw_ids, oracle, relative_error

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
if not native.has_cuda():
    pytest.skip(native.status(), allow_module_level=True)

SHAPES = {"small": (50, 3, 8, 33), "wide": (1000, 8, 64, 2048), "many": (20000, 6, 256, 128)}


def draw(shape, dtype, seed=0):
    tokens, k, experts, hidden = shape
    torch.manual_seed(seed)
    ids_TK = draw_ids(tokens, k, experts, "dropped").cuda()
    x_TH, dy_TH = (torch.randn(tokens, hidden, device="cuda").to(dtype) for _ in range(2))
    return ids_TK, x_TH, dy_TH, torch.rand(tokens, k, device="cuda")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_row_map(routing, dtype):
    tokens, k, experts, kind = ROUTINGS[routing]
    ids_TK = draw_ids(tokens, k, experts, kind).to(dtype)
    plan = row_plan(ids_TK.cuda(), num_experts=experts)
    want = RowPlan(*reference.row_map(ids_TK, experts), experts)
    assert passes.backend("cuda") == "cuda"
    assert torch.equal(plan.counts_E.cpu(), want.counts_E)
    assert torch.equal(plan.row_of_slot_TK.cpu(), want.row_of_slot_TK)
    assert torch.equal(plan.slot_of_row_N.cpu(), want.slot_of_row_N)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_equal_the_reference(shape, dtype):
    ids_TK, x_TH, dy_TH, probs_TK = draw(SHAPES[shape], dtype)
    plan = row_plan(ids_TK, num_experts=SHAPES[shape][2])
    rows_NH = passes.permute(x_TH, plan)
    assert torch.equal(rows_NH, reference.permute(x_TH, plan))
    bound = 3e-7 if dtype == torch.float32 else 2e-3
    for probs in (probs_TK, None):
        y_TH = passes.unpermute(rows_NH, plan, probs)
        assert relative_error(y_TH, reference.unpermute(rows_NH, plan, probs)) < bound
        drows_NH, dprobs_TK = passes.unpermute_backward(dy_TH, plan, probs_TK=probs, rows_NH=rows_NH)
        want = reference.unpermute_backward(dy_TH, plan, probs_TK=probs, rows_NH=rows_NH)
        assert torch.equal(drows_NH, want[0])
        assert relative_error(dprobs_TK, want[1]) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("outer", "inner"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2]
)
def test_casts_and_pad_rows_equal_the_reference(shape, outer, inner):
    ids_TK, x_TH, dy_TH, probs_TK = draw(SHAPES[shape], outer)
    plan = row_plan(ids_TK, num_experts=SHAPES[shape][2], align=16)
    rows_NH = passes.permute(x_TH, plan, dtype=inner)
    assert torch.equal(rows_NH, reference.permute(x_TH, plan, dtype=inner))
    rows_NH[plan.slot_of_row_N < 0] = float("nan")  # a pad row is never read
    y_TH = passes.unpermute(rows_NH, plan, probs_TK, dtype=outer)
    bound = 3e-7 if outer == torch.float32 else 2e-3
    assert relative_error(y_TH, reference.unpermute(rows_NH, plan, probs_TK, dtype=outer)) < bound
    arguments = {"probs_TK": probs_TK, "rows_NH": rows_NH, "dtype": inner}
    drows_NH, dprobs_TK = passes.unpermute_backward(dy_TH, plan, **arguments)
    want = reference.unpermute_backward(dy_TH, plan, **arguments)
    assert torch.equal(drows_NH, want[0])
    assert relative_error(dprobs_TK, want[1]) < 1e-6


@pytest.mark.parametrize("known", [False, True])
def test_the_row_map_with_pad_rows(known):
    """With a known number of rows N is a bound: what lies beyond the last expert's rows is padding, too."""
    ids_TK = draw_ids(3000, 4, 96, "distinct")
    want = RowPlan(*reference.row_map(ids_TK, 96, align=16), 96, 16)
    plan = row_plan(ids_TK.cuda(), num_experts=96, align=16, num_rows=12_000 if known else None)
    assert torch.equal(plan.row_of_slot_TK.cpu(), want.row_of_slot_TK)
    assert torch.equal(plan.slot_of_row_N[: want.num_rows].cpu(), want.slot_of_row_N)
    assert plan.num_rows >= want.num_rows
    assert known or plan.num_rows == want.num_rows
    assert (plan.slot_of_row_N[want.num_rows :] == -1).all()
    rows_NH = passes.permute(torch.ones(3000, 8, device="cuda"), plan)
    assert float(rows_NH.sum()) == 12_000 * 8
    assert not rows_NH[plan.slot_of_row_N < 0].any()


@pytest.mark.parametrize(("slots", "experts"), [(4096, 6), (4097, 6), (4500, 8192), (3_000_000, 256)])
def test_a_row_map_of_one_tile_and_of_many(slots, experts):
    ids_TK = torch.randint(-1, experts, (slots, 1), generator=torch.Generator().manual_seed(0))
    plan = row_plan(ids_TK.cuda(), num_experts=experts)
    for ours, want in zip(
        (plan.counts_E, plan.row_of_slot_TK, plan.slot_of_row_N), reference.row_map(ids_TK, experts), strict=True
    ):
        assert torch.equal(ours.cpu(), want)


def test_gradients_equal_the_loops():
    ids_TK, x_TH, dy_TH, probs_TK = draw(SHAPES["small"], torch.float32)
    x_TH.requires_grad_(), probs_TK.requires_grad_()
    rows_NH, plan = permute(x_TH, ids_TK, num_experts=8)
    weight_NH = torch.randn(rows_NH.shape, device="cuda", requires_grad=True)
    unpermute(rows_NH * weight_NH, plan, probs_TK).backward(dy_TH)
    want = oracle(*(t.detach().cpu() for t in (x_TH, ids_TK, probs_TK, weight_NH, dy_TH)))
    for name, grad in (("dx", x_TH.grad), ("dprobs", probs_TK.grad), ("dweight", weight_NH.grad)):
        assert relative_error(grad.cpu(), want[name]) < 4e-7, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_in_every_run(dtype):
    ids_TK, x_TH, dy_TH, probs_TK = draw(SHAPES["wide"], dtype)

    def run():
        plan = row_plan(ids_TK, num_experts=64)
        rows_NH = passes.permute(x_TH, plan)
        backward = passes.unpermute_backward(dy_TH, plan, probs_TK=probs_TK, rows_NH=rows_NH)
        return [plan.row_of_slot_TK, rows_NH, passes.unpermute(rows_NH, plan, probs_TK), *backward]

    first = run()
    for _ in range(3):
        for a, b in zip(first, run(), strict=True):
            assert torch.equal(a, b)


def test_a_wrong_id_raises():
    with pytest.raises(ValueError, match="expert id 7 in a layer of 4 experts"):
        row_plan(torch.tensor([[0, 7]], device="cuda"), num_experts=4)


def test_a_known_number_of_rows_spares_the_copy_to_the_host():
    ids_TK = draw_ids(100, 2, 8, "distinct").cuda()
    want = row_plan(ids_TK, num_experts=8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = row_plan(ids_TK, num_experts=8, num_rows=200)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(plan.row_of_slot_TK, want.row_of_slot_TK)


def test_a_side_stream_is_used():
    ids_TK, x_TH, _, _ = draw(SHAPES["many"], torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rows_NH, plan = permute(x_TH, ids_TK, num_experts=256)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(rows_NH, reference.permute(x_TH, plan))


def test_offsets_beyond_32_bits():
    hidden, tokens, k = 2**15, 2**14, 5  # 2.7e9 elements of rows, 5.4 GB in bf16
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    x_TH = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    rows_NH, plan = permute(x_TH, draw_ids(tokens, k, 8, "distinct").cuda(), num_experts=8)
    last = plan.slot_of_row_N[-64:].long() // k
    assert torch.equal(rows_NH[-64:], x_TH[last])
    mean_TH = unpermute(rows_NH, plan, torch.full((tokens, k), 1 / k, device="cuda"))
    assert relative_error(mean_TH[-64:], x_TH[-64:]) < 2**-8
