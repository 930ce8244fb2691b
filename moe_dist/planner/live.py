"""Bytes of tensors that are alive, on any device: real ones of a run, or those of a model on the meta device."""

from __future__ import annotations

import weakref
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes("cpu") as live:` follows every storage that an operator of this thread returns on that kind of
    device, until it is freed.

    now: bytes alive. peak: the most there were, since `restart`. What a kernel allocates and frees inside of itself is
    no tensor and is not seen. Storages that were there before count after `adopt`. flops: floating-point operations of
    the matrix products, by torch's own formulas. kernels: operators that were called and are no views.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self.flops = self.kernels = 0
        self._sizes: dict[int, int] = {}  # id of a storage that lives -> its bytes

    def adopt(self, tensors) -> None:
        """Count these tensors' storages as well."""
        for tensor in tensors:
            self._see(tensor)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.kernels += not _is_view(func)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.device:
                self._see(leaf)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        size, key = storage.nbytes(), id(storage)
        known = self._sizes.get(key)
        if known is None:
            weakref.finalize(storage, self._gone, key)
        if known != size:  # new, or resized
            self._sizes[key] = size
            self.now += size - (known or 0)
            if self.now > self.peak:
                self.peak = self.now

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@cache
def _is_view(func: torch._ops.OpOverload) -> bool:
    aliases = [one.alias_info for one in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
