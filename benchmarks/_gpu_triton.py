"""permute as a Triton kernel, as one would write it first: one program a token. Importing it needs triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _permute(x, row_of_slot, rows, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, HIDDEN, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < HIDDEN
        value = tl.load(x + token * HIDDEN + column, mask=inside)
        for k in tl.static_range(TOP_K):
            row = tl.load(row_of_slot + token * TOP_K + k).to(tl.int64)
            tl.store(rows + row * HIDDEN + column, value, mask=inside & (row >= 0))


def permute(x_TH: torch.Tensor, row_of_slot_TK: torch.Tensor, rows_NH: torch.Tensor) -> None:
    """rows[row of (t, k)] = x[t]; all contiguous."""
    (tokens, hidden), top_k = x_TH.shape, row_of_slot_TK.shape[1]
    block = min(triton.next_power_of_2(hidden), 2048)
    _permute[(tokens,)](x_TH, row_of_slot_TK, rows_NH, HIDDEN=hidden, TOP_K=top_k, BLOCK=block, num_warps=8)
