"""The row map: which row of the expert-sorted order each (token, expert) slot goes to."""

from dataclasses import dataclass

import torch

from moe_dist.ops import passes


@dataclass(frozen=True)
class RowPlan:
    """Where each slot goes. A *slot* is one (token, k) pair, numbered `t * K + k`; T·K slots in all.

    Rows are sorted by expert; within an expert they keep the order of their slots (a stable sort). A slot
    whose expert id is negative is *dropped*: it has no row, adds nothing to its token, gets a zero gradient.

    counts_E: int64 `[E]`, rows of each expert.
    row_of_slot_TK: int32 `[T, K]`, the row of each slot, -1 where it is dropped.
    slot_of_row_N: int32 `[N]`, the slot of each row. N counts the slots that are not dropped.
    num_experts: E.
    """

    counts_E: torch.Tensor
    row_of_slot_TK: torch.Tensor
    slot_of_row_N: torch.Tensor
    num_experts: int

    @property
    def num_rows(self) -> int:
        """N, the rows of the permuted tensor."""
        return self.slot_of_row_N.shape[0]

    @property
    def num_dropped(self) -> int:
        """Slots without a row."""
        return self.row_of_slot_TK.numel() - self.num_rows


def row_plan(ids_TK: torch.Tensor, *, num_experts: int, num_rows: int | None = None) -> RowPlan:
    """Sort the slots by expert, stably.

    ids_TK: int32 or int64 `[T, K]`, any strides; values in `[0, num_experts)`; negative: the slot is dropped.
    num_rows: how many ids are not negative, where the caller knows it (`ids_TK.numel()` if nothing is
        dropped). It spares a CUDA device the copy of that count to the host; wrong ids then stop the device
        instead of raising here. On the CPU it changes nothing.

    Raises ValueError for an id of `num_experts` or more, ids of another type or shape, 2^31 slots or more.
    """
    if ids_TK.dim() != 2 or ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expert ids must be int32 or int64 of shape [tokens, k], got {ids_TK.dtype} {list(ids_TK.shape)}"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if ids_TK.numel() >= 2**31:
        raise ValueError(f"{ids_TK.numel()} (token, expert) slots do not fit into 32-bit row numbers")
    if num_rows is not None and not 0 <= num_rows <= ids_TK.numel():
        raise ValueError(f"num_rows must lie in [0, {ids_TK.numel()}], got {num_rows}")
    counts_E, row_of_slot_TK, slot_of_row_N = passes.row_map(ids_TK, num_experts, num_rows)
    return RowPlan(counts_E, row_of_slot_TK, slot_of_row_N, num_experts)
