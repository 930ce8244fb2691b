"""Random routing, to compare a router with: a draw that depends on nothing but token, position, block and seed.

So it is the same in a batch or alone, with a cache or without, and on any number of ranks.
"""

from __future__ import annotations

import torch

_ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # the constants of splitmix64


def draw(
    tokens_BL: torch.Tensor, positions_BL: torch.Tensor, *, experts: int, top_k: int, seed: int, block: int
) -> torch.Tensor:
    """α `[B, L, experts]`, float32: `top_k` experts without replacement, 1 / top_k each."""
    key_BL = _scramble(_scramble(tokens_BL.long() + _signed(seed * _ODD[0] + block)) + positions_BL.long())
    ids_N = torch.arange(experts, device=key_BL.device)
    order_BLN = _scramble(key_BL.unsqueeze(-1) + ids_N * _signed(_ODD[1]))
    chosen = order_BLN.topk(top_k, dim=-1).indices
    return torch.zeros(order_BLN.shape, device=key_BL.device).scatter(-1, chosen, 1 / top_k)


def _scramble(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit integers that looks random (splitmix64)."""
    x = x + _signed(_ODD[0])
    x = (x ^ _shifted(x, 30)) * _signed(_ODD[1])
    x = (x ^ _shifted(x, 27)) * _signed(_ODD[2])
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits with zeros coming in: torch has signed integers only."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
