"""The passes in plain torch: what the native kernels are compared with, and what runs where there are none.

Sums are in fp32 (float64 for float64), in the order k = 0, 1, …, so the result does not depend on threads.
"""

import torch


def row_map(ids_TK, num_experts, num_rows=None):
    """-> counts int64 [E], row_of_slot int32 [T, K] (-1 = dropped), slot_of_row int32 [N]: see `row_plan`."""
    ids = ids_TK.reshape(-1).long()
    if ids.numel() and int(ids.max()) >= num_experts:
        raise ValueError(f"expert id {int(ids.max())} in a layer of {num_experts} experts")
    key = torch.where(ids < 0, num_experts, ids)  # dropped slots sort behind the last expert
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    kept = int(counts.sum())
    if num_rows not in (None, kept):
        raise ValueError(f"num_rows is {num_rows}, but {kept} expert ids are not negative")
    slot_of_row = torch.argsort(key, stable=True)[:kept]
    row_of_slot = torch.full_like(ids, -1, dtype=torch.int32)
    row_of_slot[slot_of_row] = torch.arange(kept, dtype=torch.int32, device=ids.device)
    return counts, row_of_slot.view(ids_TK.shape), slot_of_row.int()


def permute(x_TH, plan, *, out=None):
    """rows[r] = x[token of row r] -> [N, H], dtype of x."""
    return torch.index_select(x_TH, 0, _token_of_row(plan), out=out)


def unpermute(rows_NH, plan, probs_TK=None, *, out=None):
    """y[t] = sum over k of probs[t, k] * rows[row of (t, k)] -> [T, H], dtype of rows; None: a plain sum."""
    wide = _sum_dtype(rows_NH.dtype)
    num_tokens, top_k = plan.row_of_slot_TK.shape
    y_TH = torch.zeros(num_tokens, rows_NH.shape[1], dtype=wide, device=rows_NH.device)
    for k in range(top_k if plan.num_rows else 0):
        row_T = plan.row_of_slot_TK[:, k]
        term_TH = rows_NH.index_select(0, row_T.clamp(min=0)).to(wide)
        if probs_TK is not None:
            term_TH = term_TH * probs_TK[:, k, None].to(wide)
        if plan.num_dropped:  # by selection, not by a zero factor: a row may hold inf or NaN
            term_TH = torch.where(row_T[:, None] < 0, 0, term_TH)
        y_TH += term_TH
    return y_TH.to(rows_NH.dtype) if out is None else out.copy_(y_TH)


def unpermute_backward(dy_TH, plan, *, probs_TK=None, rows_NH=None, out=None, out_probs=None):
    """Gradients of `unpermute` -> (drows [N, H], dprobs [T, K] or None).

    drows[r] = probs[slot of r] * dy[token of r], dtype of dy. dprobs[t, k] = <dy[t], rows[row of (t, k)]> in
    fp32 (float64 for float64), zero where dropped; computed only where `rows_NH` is given.
    """
    wide = _sum_dtype(dy_TH.dtype)
    picked_NH = dy_TH.index_select(0, _token_of_row(plan))
    slot_of_row = plan.slot_of_row_N.long()
    dprobs_TK = None
    if rows_NH is not None:
        dprobs_TK = torch.empty(plan.row_of_slot_TK.shape, dtype=wide, device=dy_TH.device)
        dprobs_TK = dprobs_TK if out_probs is None else out_probs
        dprobs_TK.zero_().view(-1)[slot_of_row] = (picked_NH.to(wide) * rows_NH.to(wide)).sum(1)
    if probs_TK is not None:
        factor_N = probs_TK.reshape(-1)[slot_of_row].to(wide)
        picked_NH = (picked_NH.to(wide) * factor_N[:, None]).to(dy_TH.dtype)
    return (picked_NH if out is None else out.copy_(picked_NH)), dprobs_TK


def _token_of_row(plan):
    return plan.slot_of_row_N.long() // max(plan.row_of_slot_TK.shape[1], 1)


def _sum_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32
