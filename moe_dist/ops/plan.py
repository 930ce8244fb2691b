"""The row map: which row of the expert-sorted order each (token, expert) slot goes to."""

from dataclasses import dataclass

import torch

from moe_dist.ops import passes


@dataclass(frozen=True)
class RowPlan:
    """Where each slot goes. A *slot* is one (token, k) pair, numbered `t * K + k`; T·K slots in all.

    Rows are sorted by expert; within an expert they keep the order of their slots (a stable sort). A slot
    whose expert id is negative is *dropped*: it has no row, adds nothing to its token, gets a zero gradient.

    counts_E: int64 `[E]`, rows of each expert, without pad rows.
    row_of_slot_TK: int32 `[T, K]`, the row of each slot, -1 where it is dropped.
    slot_of_row_N: int32 `[N]`, the slot of each row, -1 for a pad row.
    num_experts: E.
    align: each expert's rows begin at a multiple of it and N is one. What that leaves free are *pad rows*: zeros
        after `permute` and in the gradients of rows, never read. 1: there are none, N counts the slots not dropped.
    """

    counts_E: torch.Tensor
    row_of_slot_TK: torch.Tensor
    slot_of_row_N: torch.Tensor
    num_experts: int
    align: int = 1

    @property
    def starts_E(self) -> torch.Tensor:
        """int64 `[E]`, the first row of each expert; its rows are starts[e] … starts[e] + counts[e] - 1."""
        padded_E = -(-self.counts_E // self.align) * self.align
        return padded_E.cumsum(0) - padded_E

    @property
    def num_rows(self) -> int:
        """N, the rows of the permuted tensor, pad rows included."""
        return self.slot_of_row_N.shape[0]

    @property
    def num_dropped(self) -> int:
        """Slots without a row. With pad rows on a CUDA device, this waits for it."""
        kept = self.num_rows if self.align == 1 else int(self.counts_E.sum())
        return self.row_of_slot_TK.numel() - kept


def row_plan(ids_TK: torch.Tensor, *, num_experts: int, num_rows: int | None = None, align: int = 1) -> RowPlan:
    """Sort the slots by expert, stably.

    ids_TK: int32 or int64 `[T, K]`, any strides; values in `[0, num_experts)`; negative: the slot is dropped.
    num_rows: how many ids are not negative, where the caller knows it (`ids_TK.numel()` if nothing is
        dropped). It spares a CUDA device the copy of that count to the host; wrong ids then stop the device
        instead of raising here. On the CPU it changes nothing.
    align: each expert's rows begin at a multiple of it, for grouped products that want that (fp8: 16). Where a CUDA
        device is spared the copy, N is a bound from above; all rows beyond the last expert's are pad rows.

    Raises ValueError for an id of `num_experts` or more, ids of another type or shape, 2^31 slots or more.
    """
    if ids_TK.dim() != 2 or ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expert ids must be int32 or int64 of shape [tokens, k], got {ids_TK.dtype} {list(ids_TK.shape)}"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if align < 1:
        raise ValueError(f"align must be at least 1, got {align}")
    if ids_TK.numel() + num_experts * (align - 1) >= 2**31:
        raise ValueError(f"{ids_TK.numel()} (token, expert) slots do not fit into 32-bit row numbers")
    if num_rows is not None and not 0 <= num_rows <= ids_TK.numel():
        raise ValueError(f"num_rows must lie in [0, {ids_TK.numel()}], got {num_rows}")
    counts_E, row_of_slot_TK, slot_of_row_N = passes.row_map(ids_TK, num_experts, num_rows, align)
    return RowPlan(counts_E, row_of_slot_TK, slot_of_row_N, num_experts, align)
