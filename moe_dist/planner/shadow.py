"""Shadows: what an experts layer and a fused attention allocate, without what they compute; for the meta device.

Their real forms need counts of real tokens, or a kernel of a real device. A shadow returns a tensor of the right shape,
keeps for the backward what the real one keeps, and holds beside it, for as long as that does, what it allocates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from moe_dist.models import ulysses
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.mixture import _needed  # which spans train, and which have a part in the backward
from moe_dist.parallel import sequence as sequence_axis
from moe_dist.parallel import tensor as tensor_axis
from moe_dist.parallel.grid import Grid
from moe_dist.train import losses

Note = Callable[[str, int], None]


@dataclass(frozen=True)
class Leg:
    """One hop of the tokens' way, as this rank sees it: rows that it sends and rows that arrive, itself included."""

    sent: int
    arrived: int


@dataclass(frozen=True)
class Rows:
    """The rows of a layer on one rank. legs: the way, empty where nothing travels. spans: rows of each span."""

    legs: tuple[Leg, ...]
    spans: tuple[int, ...]

    @property
    def computed(self) -> int:
        return sum(self.spans)


def shadow_experts(layer: MoEExperts, rows: Rows, note: Note):
    """A forward in the place of `layer.forward`. `note` is told the "expert flops" of their products."""

    def forward(hidden_TH, ids_TK, weights_TK):
        dtype = hidden_TH.dtype if layer.frozen is None else layer.frozen.down_proj.dtype
        tensors = [tensor for span in layer.spans() for tensor in span.tensors(dtype)]
        return _Mixture.apply(hidden_TH, weights_TK, ids_TK, layer, rows, note, *tensors)

    return forward


class _Mixture(torch.autograd.Function):
    """`moe.mixture` line by line, as far as it allocates."""

    @staticmethod
    def forward(ctx, x_TH, probs_TK, ids_TK, layer, rows, note, *tensors):
        needed = _needed((x_TH.requires_grad, probs_TK.requires_grad, False, False, *ctx.needs_input_grad[6:]))
        into, out_of = (2 * layer.spec.hidden * width for width in (layer.spec.inner, layer.spec.width))
        note("expert flops", rows.computed * (into + out_of))
        dtype, hidden, legs = tensors[1].dtype, x_TH.shape[1], rows.legs
        plan = _plan(x_TH, ids_TK, rows)
        ways = []
        x_MH = x_TH
        for leg in legs:
            sent_NH, x_MH = _new(x_MH, leg.sent, hidden, dtype), _new(x_MH, leg.arrived, hidden, dtype)
            ways.append((sent_NH, x_MH) if leg is legs[0] else x_MH)
        rows_RH = _new(x_MH, rows.computed, hidden, dtype)
        y_RH = _new(x_MH, rows.computed, hidden, dtype)
        zs = [
            _new(x_MH, count, layer.spec.inner, dtype) if backward and not layer.recompute else None
            for count, (_, backward) in zip(rows.spans, needed, strict=True)
        ]
        wanted = sum(
            count
            for count, (trains, backward) in zip(rows.spans, needed, strict=True)
            if trains or (layer.recompute and backward)
        )
        kept = None
        if wanted:
            kept = x_MH if len(x_MH) <= wanted else _new(x_MH, wanted, hidden, dtype)
        del rows_RH
        wire = torch.promote_types(x_TH.dtype, torch.float32) if layer.wide_sums else x_TH.dtype
        out_MH = _new(x_MH, len(x_MH), hidden, _sum_dtype(wire, x_TH.dtype, legs))
        del y_RH
        back = _back(out_MH, legs, wire)
        y_TH = _new(x_TH, len(x_TH), hidden, x_TH.dtype) if legs else out_MH
        del ways, back
        ctx.save_for_backward(*(tensor for tensor in (kept, *zs, *plan, *tensors) if tensor is not None))
        ctx.layer, ctx.rows, ctx.wanted, ctx.x, ctx.wire = layer, rows, wanted, (x_TH.dtype, dtype), wire
        ctx.needed, ctx.note, ctx.products = needed, note, (into, out_of)
        ctx.probs = probs_TK.shape, probs_TK.dtype
        ctx.shapes = [None if tensor is None else tensor.shape for tensor in tensors]
        return y_TH

    @staticmethod
    def backward(ctx, dy_TH):
        saved = ctx.saved_tensors  # noqa: F841 - alive as long as this runs
        needs_x, needs_probs, _, _, _, _, *needs = ctx.needs_input_grad
        layer, rows, (x_dtype, dtype), hidden = ctx.layer, ctx.rows, ctx.x, dy_TH.shape[1]
        legs, count = rows.legs, rows.computed
        for span_rows, (trains, backward) in zip(rows.spans, ctx.needed, strict=True):
            into, out_of = ctx.products
            each = (into + out_of) * trains + out_of * backward + into * (needs_x + (backward and layer.recompute))
            ctx.note("expert flops", span_rows * each)
        ways, dy_MH = [], dy_TH
        for leg in legs:
            sent_NH, dy_MH = _new(dy_TH, leg.sent, hidden, dtype), _new(dy_TH, leg.arrived, hidden, dtype)
            ways.append((sent_NH, dy_MH) if leg is legs[0] else dy_MH)
        rows_RH = _new(dy_TH, ctx.wanted, hidden, dtype)
        dy_RH = _new(dy_TH, count, hidden, dtype)
        dx_RH = _new(dy_TH, count, hidden, dtype) if needs_x else None
        grads = [
            dy_TH.new_empty(shape, dtype=dtype) if needed else None
            for shape, needed in zip(ctx.shapes, needs, strict=True)
        ]
        dx_MH = _new(dy_TH, len(dy_MH), hidden, _sum_dtype(ctx.wire, x_dtype, legs)) if needs_x else None
        home = _back(dx_MH, legs, ctx.wire) if needs_x else None
        del rows_RH, dy_RH, dx_RH
        dx_TH = None
        if needs_x:
            dx_TH = _new(dy_TH, len(dy_TH), hidden, x_dtype) if legs else dx_MH
        shape, probs_dtype = ctx.probs
        dprobs_TK = dy_TH.new_empty(shape, dtype=probs_dtype) if needs_probs else None
        del home, ways
        return dx_TH, dprobs_TK, None, None, None, None, *grads


def _new(like: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return like.new_empty(rows, columns, dtype=dtype)


def _sum_dtype(wire: torch.dtype, dtype: torch.dtype, legs: Sequence[Leg]) -> torch.dtype:
    if len(legs) > 1:
        return torch.promote_types(wire, torch.float32)
    return wire if legs else dtype


def _back(out_MH: torch.Tensor, legs: Sequence[Leg], wire: torch.dtype) -> list[torch.Tensor]:
    """The rows on their way home: those that leave here and those that come home."""
    held = [out_MH]
    for leg in reversed(legs[1:]):
        held = [_new(out_MH, leg.sent, out_MH.shape[1], wire)]
    return [*held, _new(out_MH, legs[0].sent, out_MH.shape[1], wire)] if legs else held


def _plan(x_TH: torch.Tensor, ids_TK: torch.Tensor, rows: Rows) -> list[torch.Tensor]:
    """The tables that a dispatch plan keeps (`moe.dispatch.Part`, `moe.hop.Hop`)."""
    tokens, top_k = ids_TK.shape
    tables = []
    for leg in rows.legs:
        tables += [x_TH.new_empty(tokens, top_k, dtype=torch.int32), x_TH.new_empty(tokens, top_k, dtype=torch.int64)]
        tables += [x_TH.new_empty(leg.sent, dtype=torch.int32)]
        tokens = leg.arrived
    seats = x_TH.new_empty(tokens, top_k, dtype=torch.int32), x_TH.new_empty(rows.computed, dtype=torch.int32)
    return [*tables, *seats, x_TH.new_empty(tokens, top_k, dtype=torch.float32)]


class _Paper:
    """`torch.distributed` for groups that are numbers."""

    @staticmethod
    def get_world_size(group: int) -> int:
        return group

    @staticmethod
    def get_rank(group: int) -> int:
        return 0


@contextlib.contextmanager
def paper_groups(model: nn.Module, grid: Grid, note: Note) -> Iterator[None]:
    """Let a model that the tensor and the sequence axis have cut run without groups: nothing travels, and `note` is
    told what would, by the name of the axis: the bytes that this rank would send to others, and the exchanges."""

    def exchange(rows_SN, send, receive, group, *, what):
        note("sequence", rows_SN[1:].nbytes)
        note("sequence exchanges", 1)
        return torch.empty_like(rows_SN)

    def gathered(x, size, group):
        note("tensor", (size - 1) * x.nbytes)
        note("tensor exchanges", 1)
        *outer, tokens, hidden = x.shape
        parts = x.new_empty(size, *x.shape)
        return parts.movedim(0, tensor_axis.TOKENS - 1).reshape(*outer, size * tokens, hidden)

    def summed(x, size, group):
        note("tensor", x.nbytes // size * (size - 1))
        note("tensor exchanges", 1)
        *outer, tokens, hidden = x.shape
        slices = x.reshape(*outer, size, tokens // size, hidden).movedim(tensor_axis.TOKENS - 1, 0).contiguous()
        parts = torch.empty_like(slices)
        total = parts[0].to(torch.promote_types(x.dtype, torch.float32), copy=True)
        return total.to(x.dtype)

    with contextlib.ExitStack() as stack:
        for module in (ulysses, sequence_axis):
            stack.enter_context(mock.patch.object(module, "dist", _Paper))
        stack.enter_context(mock.patch.object(sequence_axis, "exchange", exchange))
        stack.enter_context(mock.patch.object(tensor_axis, "_gathered", gathered))
        stack.enter_context(mock.patch.object(tensor_axis, "_summed", summed))
        for module in model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, ulysses.OverRanks):
                stack.enter_context(mock.patch.object(config, "group", grid.sequence))
        yield


@contextlib.contextmanager
def fused_attention(note: Note, *, masked: bool, wide_heads: bool) -> Iterator[None]:
    """`scaled_dot_product_attention` as a fused kernel computes it: kept are its inputs, its output and one number a
    row. A boolean mask is kept as what it is turned into, numbers of the inputs' dtype.

    masked: whether there is a mask; if not, one that is given stands for plain causal attention. wide_heads: whether
    the kernel takes values of another width than queries; those of a CPU do not, and the products are made one by one.
    `note` is told the "flops" of a causal half.
    """
    real = F.scaled_dot_product_attention

    def shadow(query, key, value, attn_mask=None, *args, **kwargs):
        if query.shape[-1] != value.shape[-1] and not wide_heads:
            return real(query, key, value, attn_mask, *args, **kwargs)
        mask = attn_mask if masked else None
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty(mask.shape, dtype=query.dtype, device=query.device)
        return _Attention.apply(query, key, value, mask, note)

    F.scaled_dot_product_attention = shadow
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, note):
        pairs = query.shape[:-1].numel() * key.shape[-2] // 2
        ctx.note, ctx.flops = note, 2 * pairs * (query.shape[-1] + value.shape[-1])
        note("flops", ctx.flops)
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32), mask)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        ctx.note("flops", ctx.flops * 5 // 2)  # the scores again, and the gradients of four factors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


class Loss(torch.autograd.Function):
    """`train.losses.target_loss_sum`: kept are the logits and a number a row; the gradient is as large as they are.
    Ranks that hold parts of the vocabulary send each other two numbers a row."""

    @staticmethod
    def forward(ctx, logits_NV, parts, note):
        count = len(logits_NV)
        note("tensor", (parts - 1) * 2 * count * torch.float32.itemsize)
        note("tensor exchanges", int(parts > 1))
        ctx.save_for_backward(logits_NV, logits_NV.new_empty(count, dtype=torch.float32))
        _loss_block(logits_NV)
        return logits_NV.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        logits_NV, _ = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        _loss_block(logits_NV)
        return grad_NV, None, None


def _loss_block(logits_NV: torch.Tensor) -> None:
    """A block of logits at a time is turned into float32, where it is not, and something computed of that."""
    rows = min(max(losses._BLOCK // logits_NV.shape[1], 1), len(logits_NV))
    wide = logits_NV[:rows].float()
    torch.empty_like(wide)
