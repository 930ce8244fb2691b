"""The native kernels: finding the library, saying what runs, and the passes of `reference` by its ops.

The library is built at install time (setup.py). Without it, or with MOE_DIST_NATIVE=0 in the environment, everything
runs by the plain torch reference.
"""

import functools
import os
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_LARGE_PAGES_FROM = 8 << 20  # bytes
BUILD_NOTE = _FOLDER / "_native_build.txt"  # one line that setup.py leaves: what was built, or why not


@functools.cache
def _load() -> tuple[bool, str]:
    """Load the library once -> (loaded, why not)."""
    if os.environ.get("MOE_DIST_NATIVE", "1") == "0":
        return False, "switched off by MOE_DIST_NATIVE=0"
    libraries = sorted(_FOLDER.glob("_native*.so"))
    if not libraries:
        note = BUILD_NOTE.read_text().strip() if BUILD_NOTE.exists() else "the package was not built here"
        return False, note
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return False, f"{libraries[0].name} does not load: {str(error).splitlines()[0]}"
    return True, ""


def has_cpu() -> bool:
    """Whether the C++ kernels run here."""
    return _load()[0]


@functools.cache
def has_cuda() -> bool:
    """Whether the CUDA kernels were built and there is a device for them."""
    return has_cpu() and torch.ops.moe_dist.has_cuda() and torch.cuda.is_available()


def status() -> str:
    """One line: which kernels run and, where they do not, why."""
    loaded, why = _load()
    if not loaded:
        return f"plain torch for CPU and CUDA ({why})"
    cpu = f"C++ kernels ({torch.ops.moe_dist.instruction_set()})"
    if has_cuda():
        return f"{cpu} on the CPU, CUDA kernels on the GPU"
    if torch.ops.moe_dist.has_cuda():
        return f"{cpu} on the CPU; CUDA kernels are built, no GPU is visible"
    note = BUILD_NOTE.read_text().strip() if BUILD_NOTE.exists() else "built without CUDA"
    return f"{cpu} on the CPU, plain torch on CUDA ({note})"


def row_map(ids_TK, num_experts, num_rows=None):
    device, num_slots = ids_TK.device, ids_TK.numel()
    counts_E = torch.empty(num_experts, dtype=torch.int64, device=device)
    row_of_slot_TK = torch.empty(ids_TK.shape, dtype=torch.int32, device=device)
    slot_of_row = torch.empty(num_slots, dtype=torch.int32, device=device)
    status_2 = torch.empty(2, dtype=torch.int64, device=device)
    expected = -1 if num_rows is None else num_rows
    torch.ops.moe_dist.row_map(ids_TK.contiguous(), num_experts, expected, counts_E, row_of_slot_TK, slot_of_row, status_2)
    if num_rows is None or device.type == "cpu":
        kept, wrong_id = status_2.tolist()
        if wrong_id >= 0:
            raise ValueError(f"expert id {wrong_id} in a layer of {num_experts} experts")
        if num_rows not in (None, kept):
            raise ValueError(f"num_rows is {num_rows}, but {kept} expert ids are not negative")
        num_rows = kept
    return counts_E, row_of_slot_TK, slot_of_row[:num_rows]


def permute(x_TH, plan, *, out=None):
    if out is None:
        out = _empty(plan.num_rows, x_TH)
    torch.ops.moe_dist.permute(_dense_columns(x_TH), plan.row_of_slot_TK, out)
    return out


def unpermute(rows_NH, plan, probs_TK=None, *, out=None):
    if out is None:
        out = _empty(plan.row_of_slot_TK.shape[0], rows_NH)
    torch.ops.moe_dist.unpermute(_dense_columns(rows_NH), plan.row_of_slot_TK, _fp32(probs_TK), out)
    return out


def unpermute_backward(dy_TH, plan, *, probs_TK=None, rows_NH=None, out=None, out_probs=None):
    if out is None:
        out = _empty(plan.num_rows, dy_TH)
    if rows_NH is not None:
        rows_NH = _dense_columns(rows_NH)
        if out_probs is None:
            out_probs = torch.empty(plan.row_of_slot_TK.shape, dtype=torch.float32, device=dy_TH.device)
    torch.ops.moe_dist.unpermute_backward(
        _dense_columns(dy_TH), plan.row_of_slot_TK, _fp32(probs_TK), rows_NH, out, out_probs
    )
    return out, out_probs


def _empty(length, like):
    """An output `[length, H]`; on the CPU a large one asks for large pages before it is first written."""
    out = torch.empty(length, like.shape[1], dtype=like.dtype, device=like.device)
    if like.device.type == "cpu" and out.numel() * out.element_size() >= _LARGE_PAGES_FROM:
        torch.ops.moe_dist.advise_large_pages(out)
    return out


def _dense_columns(matrix):
    """The kernels take any row stride, but columns next to each other."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _fp32(probs_TK):
    return None if probs_TK is None else probs_TK.to(torch.float32).contiguous()
