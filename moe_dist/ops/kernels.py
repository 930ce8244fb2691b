"""The passes of `reference` by the native kernels, for fp32 and bf16 on a CPU or CUDA device.

The same functions with the same arguments; only where the library is loaded (`native.has_cpu`, `native.has_cuda`).
"""

import torch

from moe_dist.ops import memory


def row_map(ids_TK, num_experts, num_rows=None, align=1):
    expected = -1 if num_rows is None else num_rows
    counts_E, row_of_slot_TK, slot_of_row, status_3 = torch.ops.moe_dist.row_map.default(
        ids_TK.contiguous(), num_experts, align, expected
    )
    if num_rows is None or not ids_TK.is_cuda:
        kept, wrong_id, padded = status_3.tolist()
        if wrong_id >= 0:
            raise ValueError(f"expert id {wrong_id} in a layer of {num_experts} experts")
        if num_rows not in (None, kept):
            raise ValueError(f"num_rows is {num_rows}, but {kept} expert ids are not negative")
        num_rows = padded if align > 1 else kept
    elif align > 1:  # a bound: what lies beyond the last expert's rows are pad rows too
        num_rows += min(num_experts, num_rows) * (align - 1)
        num_rows -= num_rows % align
    return counts_E, row_of_slot_TK, slot_of_row if num_rows == slot_of_row.shape[0] else slot_of_row[:num_rows]


def permute(x_TH, plan, *, dtype=None, out=None):
    if out is None:
        out = memory.empty(x_TH, plan.num_rows, x_TH.shape[1], dtype=dtype)
    torch.ops.moe_dist.permute(_dense_columns(x_TH), plan.row_of_slot_TK, _pads(plan), out)
    return out


def unpermute(rows_NH, plan, probs_TK=None, *, dtype=None, out=None):
    if out is None:
        out = memory.empty(rows_NH, plan.row_of_slot_TK.shape[0], rows_NH.shape[1], dtype=dtype)
    torch.ops.moe_dist.unpermute(_dense_columns(rows_NH), plan.row_of_slot_TK, _fp32(probs_TK), out)
    return out


def unpermute_backward(dy_TH, plan, *, probs_TK=None, rows_NH=None, dtype=None, out=None, out_probs=None):
    if out is None:
        out = memory.empty(dy_TH, plan.num_rows, dy_TH.shape[1], dtype=dtype)
    if rows_NH is not None:
        rows_NH = _dense_columns(rows_NH)
        if out_probs is None:
            out_probs = torch.empty(plan.row_of_slot_TK.shape, dtype=torch.float32, device=dy_TH.device)
    torch.ops.moe_dist.unpermute_backward(
        _dense_columns(dy_TH), plan.row_of_slot_TK, _pads(plan), _fp32(probs_TK), rows_NH, out, out_probs
    )
    return out, out_probs


def _dense_columns(matrix):
    """The kernels take any row stride, but columns next to each other."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _pads(plan):
    """What tells the kernels of pad rows, where there may be any."""
    return plan.slot_of_row_N if plan.align > 1 else None


def _fp32(probs_TK):
    return None if probs_TK is None else probs_TK.to(torch.float32).contiguous()
