"""Tensor operations of the hot path: a plain torch reference and native kernels side by side."""

from moe_dist.ops.passes import backend
from moe_dist.ops.permute import permute, permute_rows, unpermute
from moe_dist.ops.plan import RowPlan, row_plan

__all__ = ["RowPlan", "backend", "permute", "permute_rows", "row_plan", "unpermute"]
