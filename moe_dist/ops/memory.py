"""Memory for large tensors that are written once, from end to end."""

from __future__ import annotations

import math

import torch

from moe_dist.ops import native

_LARGE = 1 << 20  # bytes; the C library keeps smaller blocks itself


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`like.new_empty(shape, dtype=dtype)`; on a CPU, where it is large, in memory that an earlier one has left.

    That memory is there again as soon as nothing holds the tensor or a view of it. At no time does the process hold
    more of it than it has used at once.
    """
    dtype = like.dtype if dtype is None else dtype
    bytes_wanted = math.prod(shape) * dtype.itemsize
    if bytes_wanted < _LARGE or like.device.type != "cpu" or not native.has_cpu():
        return like.new_empty(shape, dtype=dtype)
    # Not a view: autograd would refuse to change it in place later.
    return like.new_empty(0, dtype=dtype).set_(torch.ops.moe_dist.recycled(bytes_wanted).untyped_storage(), 0, shape)
