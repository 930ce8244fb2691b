"""The CUDA kernels' own source, compiled by the C++ compiler and run on the CPU (cuda_on_cpu/), against plain torch.

What this shows: indices, sums, the order of the sort, nothing written out of bounds, no misaligned wide access (the
compiler plants a trap for each), and no barrier missing where running the threads forwards and backwards differs. What
it cannot: races within a statement, and speed.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from moe_dist.ops import RowPlan, reference
from moe_dist.ops.swiglu import swiglu
from tests.ops.cases import ROUTINGS, draw_ids, relative_error

ROOT = Path(__file__).parents[2]
GUARD = 64  # elements after each output that must stay as they are


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if not compiler or not (ROOT / "csrc" / "permute_cuda.cu").exists():
        pytest.skip("needs g++ and the sources")
    target = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    flags = [
        "-O1",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-w",
        "-fsanitize=alignment",
        "-fsanitize-undefined-trap-on-error",
    ]
    here = ROOT / "tests" / "ops" / "cuda_on_cpu"
    command = [compiler, *flags, f"-I{here}", f"-I{ROOT / 'csrc'}", str(here / "kernels.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.row_map_scratch.restype = ctypes.c_int64
    for name in ("row_map", "permute", "unpermute", "unpermute_backward", "swiglu", "swiglu_backward"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@pytest.fixture(params=["forwards", "backwards"])
def kernels(library, request):
    """The library, with threads, warps and blocks that take turns in one order or the other."""
    library.set_reverse(ctypes.c_int64(request.param == "backwards"))
    return library


def call(function, *arguments):
    """Tensors as pointers, integers as int64."""
    return function(
        *(
            None
            if value is None
            else ctypes.c_void_p(value.data_ptr())
            if isinstance(value, torch.Tensor)
            else ctypes.c_int64(value)
            for value in arguments
        )
    )


class Output:
    """Memory for an output, with a guard behind it. Starts as garbage."""

    def __init__(self, *shape, dtype):
        count = torch.Size(shape).numel()
        self.memory = torch.full((count + GUARD,), 99, dtype=dtype)
        self.tensor = self.memory[:count].view(shape)

    def checked(self):
        assert (self.memory[self.tensor.numel() :] == 99).all(), "written beyond the end"
        return self.tensor


def run_row_map(kernels, ids_TK, experts, expected=-1, align=1):
    """-> (error or None, counts, row_of_slot, slot_of_row with all of its room, status)."""
    ids_TK, slots = ids_TK.contiguous(), ids_TK.numel()
    room = slots + min(experts, slots) * (align - 1)
    scratch = Output(kernels.row_map_scratch(ctypes.c_int64(slots), ctypes.c_int64(experts)), dtype=torch.int32)
    counts, row_of_slot = Output(experts, dtype=torch.int64), Output(*ids_TK.shape, dtype=torch.int32)
    slot_of_row, status = Output(room, dtype=torch.int32), Output(3, dtype=torch.int64)
    outputs = [counts, row_of_slot, slot_of_row, status]
    error = call(
        kernels.row_map,
        ids_TK,
        int(ids_TK.dtype == torch.int64),
        slots,
        experts,
        align,
        expected,
        *(output.tensor for output in outputs),
        scratch.tensor,
    )
    scratch.checked()
    return error, *(output.checked() for output in outputs)


def check_row_map(kernels, ids_TK, experts, align=1):
    error, counts, row_of_slot, slot_of_row, status = run_row_map(kernels, ids_TK, experts, align=align)
    want_counts, want_row_of_slot, want_slot_of_row = reference.row_map(ids_TK, experts, align=align)
    assert error is None
    assert status.tolist() == [int(want_counts.sum()), -1, len(want_slot_of_row)]
    assert torch.equal(counts, want_counts)
    assert torch.equal(row_of_slot, want_row_of_slot)
    assert torch.equal(slot_of_row[: len(want_slot_of_row)], want_slot_of_row)
    if align > 1:  # as far as the host, which does not know N, may read
        assert (slot_of_row[len(want_slot_of_row) :] == -1).all()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("align", [1, 16])
def test_row_map(kernels, routing, dtype, align):
    tokens, k, experts, kind = ROUTINGS[routing]
    check_row_map(kernels, draw_ids(tokens, k, experts, kind).to(dtype), experts, align)


@pytest.mark.parametrize(("slots", "experts"), [(4096, 6), (4097, 6), (5001, 3000), (4500, 8192), (140_000, 70)])
@pytest.mark.parametrize("align", [1, 8])
def test_row_map_of_several_tiles(kernels, slots, experts, align):
    """One launch and two; fewer warps where more experts have to fit into a block's shared memory; 1,024 and more
    slots a tile."""
    ids_TK = torch.randint(-1, experts, (slots, 1), generator=torch.Generator().manual_seed(0))
    check_row_map(kernels, ids_TK, experts, align)


@pytest.mark.parametrize("tokens", [2, 3000])
def test_row_map_reports_wrong_ids_and_stops_on_broken_promises(kernels, tokens):
    ids_TK = torch.zeros(tokens, 2, dtype=torch.int64)
    ids_TK[1, 1], ids_TK[0, 1] = 2**40, 9
    error, _, _, _, status = run_row_map(kernels, ids_TK, 4)
    assert error is None
    assert int(status[1]) == 2**40
    for kept in (2 * tokens, 2 * tokens - 2):
        assert run_row_map(kernels, ids_TK, 4, expected=kept)[0] == b"the device stopped"
    ids_TK[1, 1] = -1
    assert run_row_map(kernels, ids_TK, 16, expected=2 * tokens)[0] == b"the device stopped"
    assert run_row_map(kernels, ids_TK, 16, expected=2 * tokens - 1)[0] is None


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("routing", ["plain", "no tokens", "one hot expert", "dropped slots", "all dropped"])
@pytest.mark.parametrize("hidden", [1, 3, 4, 6, 8, 33, 264])
@pytest.mark.parametrize("dtype", DTYPES)
def test_data_movement(kernels, routing, hidden, dtype):
    tokens, k, experts, kind = ROUTINGS[routing]
    check_data_movement(kernels, draw_ids(tokens, k, experts, kind), experts, hidden, dtype, dtype)


@pytest.mark.parametrize("hidden", [1, 6, 40, 1026, 2056])
@pytest.mark.parametrize(("outer", "inner"), [DTYPES, DTYPES[::-1]])
@pytest.mark.parametrize("align", [1, 16])
def test_data_movement_with_a_cast_and_pad_rows(kernels, hidden, outer, inner, align):
    check_data_movement(kernels, draw_ids(13, 4, 12, "dropped"), 12, hidden, outer, inner, align)


@pytest.mark.parametrize("k", [1, 4, 5, 8, 9, 17])
def test_data_movement_for_each_number_of_experts_a_token(kernels, k):
    check_data_movement(kernels, draw_ids(13, k, 24, "dropped"), 24, 40, torch.bfloat16, torch.bfloat16)


def test_data_movement_without_columns(kernels):
    check_data_movement(kernels, draw_ids(5, 2, 4, "distinct"), 4, 0, torch.float32, torch.float32)


def check_data_movement(kernels, ids_TK, experts, hidden, outer, inner, align=1):
    """outer: the dtype of tokens; inner: that of rows."""
    tokens, k = ids_TK.shape
    plan = RowPlan(*reference.row_map(ids_TK, experts, align=align), experts, align)
    generator = torch.Generator().manual_seed(2)
    x_TH, dy_TH = (torch.randn(tokens, hidden, generator=generator).to(outer) for _ in range(2))
    rows_NH = torch.randn(plan.num_rows, hidden, generator=generator).to(inner)
    if plan.num_rows:
        rows_NH[plan.slot_of_row_N < 0] = float("nan")  # a pad row is never read
    slots = (plan.row_of_slot_TK, tokens, k)
    padded = (*slots, plan.slot_of_row_N if align > 1 else None, plan.num_rows, hidden)
    at_tokens, at_rows = (int(dtype == torch.bfloat16) for dtype in (outer, inner))

    out = Output(plan.num_rows, hidden, dtype=inner)
    assert call(kernels.permute, *padded, at_tokens, x_TH, at_rows, out.tensor) is None
    assert torch.equal(out.checked(), reference.permute(x_TH, plan, dtype=inner))

    bound = 3e-7 if outer == torch.float32 else 2e-3  # bf16: a sum may round to the neighbour
    for probs_TK in (torch.rand(tokens, k, generator=generator), None):
        y = Output(tokens, hidden, dtype=outer)
        arguments = (*slots, hidden, at_rows, rows_NH, probs_TK, at_tokens, y.tensor)
        assert call(kernels.unpermute, *arguments) is None
        assert relative_error(y.checked(), reference.unpermute(rows_NH, plan, probs_TK, dtype=outer)) < bound

        want = reference.unpermute_backward(dy_TH, plan, probs_TK=probs_TK, rows_NH=rows_NH, dtype=inner)
        drows, dprobs = Output(plan.num_rows, hidden, dtype=inner), Output(tokens, k, dtype=torch.float32)
        arguments = (*padded, at_tokens, dy_TH, probs_TK, at_rows, rows_NH, drows.tensor, dprobs.tensor)
        assert call(kernels.unpermute_backward, *arguments) is None
        assert torch.equal(drows.checked(), want[0])
        assert relative_error(dprobs.checked(), want[1]) < 1e-6

        drows = Output(plan.num_rows, hidden, dtype=inner)
        arguments = (*padded, at_tokens, dy_TH, probs_TK, at_rows, None, drows.tensor, None)
        assert call(kernels.unpermute_backward, *arguments) is None
        assert torch.equal(drows.checked(), want[0])


# widths: part of a warp, a warp, several warps that share a row, and more packs than threads
WIDTHS = [(0, 8), (5, 1), (3, 7), (70, 24), (9, 100), (6, 576), (2, 2100), (2, 4608)]


@pytest.mark.parametrize(("rows", "width"), WIDTHS)
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(kernels, rows, width, dtype, factored):
    generator = torch.Generator().manual_seed(width)
    padded = 2 * width + (8 if width % 2 == 0 else 0)  # rows of z may lie apart
    z = (3 * torch.randn(rows, padded, generator=generator)).to(dtype)
    grad = torch.randn(rows, width, generator=generator).to(dtype)
    factor = torch.rand(rows, generator=generator) if factored else None

    z_64 = z[:, : 2 * width].double().requires_grad_()
    factor_64 = torch.ones(rows, dtype=torch.float64) if factor is None else factor.double()
    want = swiglu(z_64) * factor_64.requires_grad_()[:, None]
    want_dz, want_dfactor = torch.autograd.grad(want, (z_64, factor_64), grad.double())
    bound = 2e-7 if dtype == torch.float32 else 2**-8  # bf16: one rounding

    shape = (rows, width, padded, int(dtype == torch.bfloat16))
    a = Output(rows, width, dtype=dtype)
    assert call(kernels.swiglu, *shape, z, factor, a.tensor) is None
    assert relative_error(a.checked(), want) < bound

    for wanted in (False, True):
        a, dz = Output(rows, width, dtype=dtype), Output(rows, 2 * width, dtype=dtype)
        a.tensor.copy_(grad)  # the activation may overwrite its gradient
        dfactor = Output(rows, dtype=torch.float32) if wanted else None
        arguments = (a.tensor, z, factor, a.tensor, dz.tensor, None if dfactor is None else dfactor.tensor)
        assert call(kernels.swiglu_backward, *shape, *arguments) is None
        assert relative_error(a.checked(), want) < bound
        assert relative_error(dz.checked(), want_dz) < bound
        if wanted:
            assert relative_error(dfactor.checked(), want_dfactor) < 1e-6
