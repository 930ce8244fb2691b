"""The weights of a layer's experts on one rank: a trainable and a frozen span of stacked tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from moe_dist.ops.swiglu import swiglu

__all__ = ["ExpertSpan", "ExpertSpec", "swiglu"]


@dataclass(frozen=True)
class ExpertSpec:
    """What the experts of a layer compute, whatever family they come from.

    `activation` maps z `[R,F]` to a `[R,I]`: `swiglu`, or a family's own function (gpt-oss clamps and interleaves).
    `gated`: F = 2I; otherwise F = I. `bias`: both products add a bias.
    """

    num_experts: int
    hidden: int
    width: int
    activation: Callable[[torch.Tensor], torch.Tensor] = swiglu
    gated: bool = True
    bias: bool = False

    @property
    def inner(self) -> int:
        """F, the rows of an expert's first product."""
        return 2 * self.width if self.gated else self.width

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> the shape of one expert's share of it, in the canonical layout."""
        shapes: dict[str, tuple[int, ...]] = {
            "gate_up_proj": (self.inner, self.hidden),
            "down_proj": (self.hidden, self.width),
        }
        if self.bias:
            shapes |= {"gate_up_proj_bias": (self.inner,), "down_proj_bias": (self.hidden,)}
        return shapes


class ExpertSpan(nn.Module):
    """A stack of experts that all train or all stay frozen.

    Parameters: gate_up_proj `[S,F,H]`, down_proj `[S,H,I]` and, with biases, gate_up_proj_bias `[S,F]`,
    down_proj_bias `[S,H]`. `seat_ids[s]` is the global id of the expert on seat s, None for a pad seat, whose
    weights are zero. A frozen span is made of parameters that do not require grad, not of buffers, so that ZeRO 3 can
    partition it. Every parameter carries `is_expert = True`: its replicas are the expert-data-parallel ranks only.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        seat_ids: tuple[int | None, ...],
        *,
        trains: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__()
        self.seat_ids = seat_ids
        self.held = sum(expert is not None for expert in seat_ids)
        for name, shape in spec.shapes().items():
            weight = torch.zeros(len(seat_ids), *shape, dtype=dtype, device=device)
            parameter = nn.Parameter(weight, requires_grad=trains)
            parameter.is_expert = True
            self.register_parameter(name, parameter)

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
        """w_in, w_out, b_in, b_out (None without biases) in the dtype of the computation.

        Parameters of another one (masters in fp32) are rounded to it, differentiably.
        """
        names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
        tensors = [getattr(self, name, None) for name in names]
        return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
