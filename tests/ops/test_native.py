"""The C++ kernels: same bits for every thread count, kind of store and offset; each instruction set; the fallback."""

import os
import subprocess
import sys

import pytest
import torch

from moe_dist.ops import RowPlan, kernels, native, passes, reference
from tests.ops.cases import draw_ids, relative_error

needs_native = pytest.mark.skipif(not native.has_cpu(), reason=native.status())


DTYPES = [torch.float32, torch.bfloat16]


def run_passes(dtype, rows_dtype, tokens=2048, k=4, experts=16, hidden=640, misalign=0):
    """All four passes -> list of outputs. `misalign` moves the outputs off a cache line by so many elements."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    def output(length, width, dtype):
        return torch.empty(misalign + length * width, dtype=dtype)[misalign:].view(length, width)

    ids_TK = draw_ids(tokens, k, experts, "dropped")
    plan = RowPlan(*kernels.row_map(ids_TK, experts), experts)
    x_TH, dy_TH = draw(tokens, hidden, dtype=dtype), draw(tokens, hidden, dtype=dtype)
    rows_NH = draw(plan.num_rows, hidden, dtype=rows_dtype)
    probs_TK = torch.rand(tokens, k, generator=generator)
    rows_out, y_out = output(plan.num_rows, hidden, rows_dtype), output(tokens, hidden, dtype)
    drows_out, dprobs_out = output(plan.num_rows, hidden, rows_dtype), output(tokens, k, torch.float32)
    kernels.permute(x_TH, plan, out=rows_out)
    kernels.unpermute(rows_NH, plan, probs_TK, out=y_out)
    kernels.unpermute_backward(dy_TH, plan, probs_TK=probs_TK, rows_NH=rows_NH, out=drows_out, out_probs=dprobs_out)
    return [plan.counts_E, plan.row_of_slot_TK, plan.slot_of_row_N, rows_out, y_out, drows_out, dprobs_out]


@needs_native
@pytest.mark.parametrize("rows_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype, rows_dtype):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run_passes(dtype, rows_dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("experts", [24, 300])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_a_large_row_map_is_cut_into_chunks(threads, experts, align):
    before = torch.get_num_threads()
    ids_TK = torch.randint(-1, experts, (40_000, 4), generator=torch.Generator().manual_seed(0))  # up to ten chunks
    try:
        torch.set_num_threads(threads)
        got = kernels.row_map(ids_TK, experts, None, align)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(got, reference.row_map(ids_TK, experts, None, align), strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("experts", [40_000, 65_535, 65_536])  # the last is too many for the kernel
def test_many_experts_leave_few_bits_to_count_an_expert_s_slots(experts):
    """A word of 32 bits holds an expert and a count: 16 bits each here, and 140,000 slots go to one expert."""
    ids_TK = torch.full((70_000, 2), experts - 1)
    ids_TK[::7000] = torch.arange(20).view(10, 2) - 1
    got = passes.row_map(ids_TK, experts)
    for a, b in zip(got, reference.row_map(ids_TK, experts), strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("experts", [1, 2, 7, 8, 9, 256])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_at_the_ends_of_their_range(dtype, experts):
    """Every one of them among ids that are right, at each place of a line of slots and behind the last full line."""
    limits = torch.iinfo(dtype)
    dropped = [-1, -experts, limits.min, limits.min + experts]
    wrong = [experts, experts + 1, limits.max, limits.max - experts]
    if dtype == torch.int64:  # right, or another expert's, in their lower half
        dropped, wrong = [*dropped, -(2**32), -(2**32) - 1], [*wrong, 2**32, 2**31, 2**32 + experts - 1]
    right_TK = torch.arange(39, dtype=dtype).view(13, 3) % experts
    for place in (*range(17), 31, 32, 38):
        for bad in (*dropped, *wrong):
            ids_TK = right_TK.clone()
            ids_TK.view(-1)[place] = bad
            if bad in wrong:
                with pytest.raises(ValueError, match=f"expert id {bad} in a layer of {experts} experts"):
                    kernels.row_map(ids_TK, experts)
                continue
            for a, b in zip(kernels.row_map(ids_TK, experts), reference.row_map(ids_TK, experts), strict=True):
                assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("rows_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_streaming_stores_change_no_bit(dtype, rows_dtype):
    """Outputs that start on a cache line are streamed at this size, those that do not are stored plainly."""
    streamed, plain = run_passes(dtype, rows_dtype), run_passes(dtype, rows_dtype, misalign=1)
    assert streamed[3].numel() * streamed[3].element_size() > 6 << 20
    for a, b in zip(streamed, plain, strict=True):
        assert torch.equal(a, b)


@needs_native
def test_offsets_beyond_32_bits():
    """Three rows, 2^30 elements apart: the last starts 2^32 bytes and 2^31 elements on. Only the rows are touched."""
    stride, hidden = 2**30 + 64, 96
    try:
        far = torch.empty(2 * stride + hidden, dtype=torch.bfloat16).as_strided((3, hidden), (stride, 1))
    except RuntimeError as error:
        pytest.skip(f"no room for 4.3 GB of untouched memory: {error}")
    ids_TK = torch.tensor([[1], [2], [0]])
    plan = RowPlan(*kernels.row_map(ids_TK, 3), 3)
    x_TH, dy_TH = torch.randn(3, hidden).bfloat16(), torch.randn(3, hidden).bfloat16()
    assert torch.equal(kernels.permute(x_TH, plan, out=far), x_TH[[2, 0, 1]])
    assert torch.equal(kernels.unpermute(far, plan), x_TH)
    drows_NH, dprobs_TK = kernels.unpermute_backward(dy_TH, plan, rows_NH=far)
    assert torch.equal(drows_NH, dy_TH[[2, 0, 1]])
    assert relative_error(dprobs_TK.view(-1), (dy_TH.double() * x_TH.double()).sum(1)) < 1e-6
    far_drows, _ = kernels.unpermute_backward(dy_TH, plan, out=far)
    assert torch.equal(far_drows, dy_TH[[2, 0, 1]])


SCRIPT = """
import sys, torch
from moe_dist.ops import RowPlan, kernels, native, reference
from tests.ops.cases import draw_ids, relative_error
assert native.has_cpu() and torch.ops.moe_dist.instruction_set() == sys.argv[1]
torch.manual_seed(0)
f32, bf16 = torch.float32, torch.bfloat16
bound = {f32: 3e-7, bf16: 4e-4}
for outer, inner in ((f32, f32), (bf16, bf16), (f32, bf16), (bf16, f32)):
    for tokens, hidden, align in ((50, 1, 4), (50, 77, 1), (30, 256, 16), (1500, 1024, 8)):
        ids = draw_ids(tokens, 3, 8, "dropped")
        plan = RowPlan(*kernels.row_map(ids, 8, None, align), 8, align)
        for a, b in zip(kernels.row_map(ids, 8, None, align), reference.row_map(ids, 8, None, align), strict=True):
            assert torch.equal(a, b)
        x, dy = torch.randn(tokens, hidden).to(outer), torch.randn(tokens, hidden).to(outer)
        rows, probs = torch.randn(plan.num_rows, hidden).to(inner), torch.rand(tokens, 3)
        rows[0, 0] = float("nan")
        assert torch.equal(kernels.permute(x, plan, dtype=inner), reference.permute(x, plan, dtype=inner))
        a, b = (module.unpermute(rows, plan, probs, dtype=outer) for module in (kernels, reference))
        assert torch.equal(a.isnan(), b.isnan()) and a.isnan().sum() == 1
        assert relative_error(a.nan_to_num(), b.nan_to_num()) < bound[outer]
        rows[0, 0] = 1.0
        options = {"probs_TK": probs, "rows_NH": rows, "dtype": inner}
        a, b = (module.unpermute_backward(dy, plan, **options) for module in (kernels, reference))
        assert torch.equal(a[0], b[0]) and relative_error(a[1], b[1]) < 3e-7
print("equal")
"""


@needs_native
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_each_instruction_set_equals_the_reference(isa):
    order = ["portable", "avx2", "avx512"]
    if order.index(isa) > order.index(torch.ops.moe_dist.instruction_set()):
        pytest.skip(f"this processor has no {isa}")
    assert run_python(SCRIPT, isa, MOE_DIST_ISA=isa).strip() == "equal"


def test_plain_torch_can_be_forced():
    out = run_python(
        "from moe_dist.ops import backend, native; print(backend('cpu'), backend('cuda'), native.status())",
        MOE_DIST_NATIVE="0",
    )
    assert out.strip() == "torch torch plain torch for CPU and CUDA (switched off by MOE_DIST_NATIVE=0)"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "the package was not built here"),
        ({"_native_build.txt": "no native kernels: command 'g++' failed\n"}, "no native kernels: command 'g++' failed"),
        ({"_native.abi3.so": "not a library"}, "_native.abi3.so does not load"),
    ],
)
def test_a_missing_library_is_explained(tmp_path, monkeypatch, files, reason):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    monkeypatch.setattr(native, "BUILD_NOTE", tmp_path / "_native_build.txt")
    monkeypatch.delenv("MOE_DIST_NATIVE", raising=False)
    loaded, why = native._load.__wrapped__()
    assert not loaded
    assert reason in why


def run_python(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
