"""Fresh memory for large tensors that are written once, from end to end."""

from __future__ import annotations

import torch

from moe_dist.ops import native

_LARGE = 4 << 20  # bytes, from where on whole pages of 2 MiB are likely to lie inside


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """`like.new_empty(shape)`, on a CPU in large pages where the system has them.

    An allocation of this size comes from the system and goes back to it, so each step touches its pages anew; the
    kernel then clears 4 KiB at a time, which takes as long as a fifth of a layer's matrix products.
    """
    tensor = like.new_empty(shape)
    if tensor.nbytes >= _LARGE and tensor.device.type == "cpu" and native.has_cpu():
        torch.ops.moe_dist.advise_huge_pages(tensor)
    return tensor
