"""The passes in plain torch: what the native kernels are compared with, and what runs where there are none.

Sums are in fp32 (float64 for float64), in the order k = 0, 1, …, so the result does not depend on threads.
"""

import torch


def row_map(ids_TK, num_experts, num_rows=None, align=1):
    """-> counts int64 [E], row_of_slot int32 [T, K] (-1: dropped), slot_of_row int32 [N] (-1: pad): see `RowPlan`."""
    ids = ids_TK.reshape(-1).long()
    if ids.numel() and int(ids.max()) >= num_experts:
        raise ValueError(f"expert id {int(ids.max())} in a layer of {num_experts} experts")
    key = torch.where(ids < 0, num_experts, ids)  # dropped slots sort behind the last expert
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    kept = int(counts.sum())
    if num_rows not in (None, kept):
        raise ValueError(f"num_rows is {num_rows}, but {kept} expert ids are not negative")
    order = torch.argsort(key, stable=True)[:kept]
    row_of_kept = torch.arange(kept, device=ids.device)
    padded = -(-counts // align) * align
    if align > 1:
        gaps_before = (padded - counts).cumsum(0) - (padded - counts)
        row_of_kept += gaps_before.repeat_interleave(counts)
    slot_of_row = torch.full((int(padded.sum()),), -1, dtype=torch.int32, device=ids.device)
    slot_of_row[row_of_kept] = order.int()
    row_of_slot = torch.full_like(ids, -1, dtype=torch.int32)
    row_of_slot[order] = row_of_kept.int()
    return counts, row_of_slot.view(ids_TK.shape), slot_of_row


def permute(x_TH, plan, *, dtype=None, out=None):
    """rows[r] = x[token of row r] -> [N, H], cast to `dtype`; pad rows are zeros."""
    dtype = _out_dtype(x_TH, dtype, out)
    return _without_pads(torch.index_select(x_TH.to(dtype), 0, _token_of_row(plan), out=out), plan)


def unpermute(rows_NH, plan, probs_TK=None, *, dtype=None, out=None):
    """y[t] = sum over k of probs[t, k] * rows[row of (t, k)] -> [T, H], rounded once to `dtype`; None: a plain sum."""
    wide = _sum_dtype(rows_NH.dtype)
    num_tokens, top_k = plan.row_of_slot_TK.shape
    y_TH = torch.zeros(num_tokens, rows_NH.shape[1], dtype=wide, device=rows_NH.device)
    for k in range(top_k if plan.num_rows else 0):
        row_T = plan.row_of_slot_TK[:, k]
        term_TH = rows_NH.index_select(0, row_T.clamp(min=0)).to(wide)
        if probs_TK is not None:
            term_TH = term_TH * probs_TK[:, k, None].to(wide)
        if plan.align > 1 or plan.num_dropped:  # by selection, not by a zero factor: a row may hold inf or NaN
            term_TH = torch.where(row_T[:, None] < 0, 0, term_TH)
        y_TH += term_TH
    return y_TH.to(_out_dtype(rows_NH, dtype, out)) if out is None else out.copy_(y_TH)


def unpermute_backward(dy_TH, plan, *, probs_TK=None, rows_NH=None, dtype=None, out=None, out_probs=None):
    """Gradients of `unpermute` -> (drows [N, H], dprobs [T, K] or None).

    drows[r] = probs[slot of r] * dy[token of r], rounded once to `dtype`; pad rows are zeros. dprobs[t, k] =
    <dy[t], rows[row of (t, k)]> in fp32 (float64 for float64), zero where dropped; computed only where `rows_NH` is
    given, which has the dtype of drows.
    """
    wide, slot_of_row = _sum_dtype(dy_TH.dtype), plan.slot_of_row_N.long()
    dy_NH = dy_TH.index_select(0, _token_of_row(plan))
    if rows_NH is not None:
        slots = plan.row_of_slot_TK.numel()
        dots_N = (dy_NH.to(wide) * rows_NH.to(wide)).sum(1)
        dprobs = torch.zeros(slots + 1, dtype=wide, device=dy_TH.device)  # pad rows write behind the last slot
        dprobs[slot_of_row] = dots_N
        dprobs_TK = dprobs[:slots].view(plan.row_of_slot_TK.shape)
        out_probs = dprobs_TK if out_probs is None else out_probs.copy_(dprobs_TK)
    if probs_TK is not None:
        dy_NH = dy_NH.to(wide) * _factor_of_row(probs_TK, slot_of_row).to(wide)
    drows_NH = dy_NH.to(_out_dtype(dy_TH, dtype, out)) if out is None else out.copy_(dy_NH)
    return _without_pads(drows_NH, plan), out_probs


def _token_of_row(plan):
    """int64 [N]; any token for a pad row."""
    return plan.slot_of_row_N.long().clamp(min=0) // max(plan.row_of_slot_TK.shape[1], 1)


def _factor_of_row(probs_TK, slot_of_row):
    return probs_TK.reshape(-1)[slot_of_row.clamp(min=0), None]


def _without_pads(rows_NH, plan):
    return rows_NH if plan.align == 1 else rows_NH.masked_fill_(plan.slot_of_row_N[:, None] < 0, 0)


def _out_dtype(source, dtype, out):
    return out.dtype if out is not None else dtype or source.dtype


def _sum_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32
