"""A linear layer and a mixture of its LoRA experts in one (the layer of MiXSE, arXiv 2406.12034):

    y = W·x + bias + Σ_i mix_i · B_i·A_i·x

The experts lie stacked one below the other, every B turned. Two forms compute the same sum:

- *concatenated*: two dense products for all experts at once; between the two, each expert's columns times its weight;
- *chosen*: for each token the experts whose weight is not zero, in loops of our own (csrc/lora.h: CPU, frozen experts).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from moe_dist.ops import lora_chosen, lora_concatenated
from moe_dist.ops.memory import empty

FORMS = {"concatenated": lora_concatenated, "chosen": lora_chosen}

# Picoseconds for a token and a column of x or y, of one core with AVX-512 and AMX, fitted to 40 shapes (T 1 to 4096, H
# 1024 to 3072, ranks 8 and 64, 4 to 64 experts, top-1 to top-4), forward and backward alike:
#   concatenated  _PASS + _ROW · R, and _CALLS picoseconds in all for its three operations
#   chosen        _OWN_PASS + _OWN_ROW · rank for each of a token's experts
# With 4096 tokens, top-1 and rank 8 the chosen form took 0.65, 0.25 and 0.1 of the other's time at 4, 16 and 64 experts
# in fp32, and 1.4 to 1.9, 1.0 to 1.4 and 0.4 in bf16, where a dense product takes a tenth of the loops' time for a row;
# with the 8 tokens of a decoding step 0.8 (fp32) and 0.4 (bf16) at 4 experts.
_PASS = {torch.float32: 130, torch.bfloat16: 140}
_ROW = {torch.float32: 11.8, torch.bfloat16: 1.7}
_CALLS = {torch.float32: 25e6, torch.bfloat16: 65e6}
_OWN_PASS, _OWN_ROW = {torch.float32: 130, torch.bfloat16: 150}, {torch.float32: 25, torch.bfloat16: 30}


def lora_mixture(
    x_TH: torch.Tensor,
    weight_OH: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RH: torch.Tensor,
    b_RO: torch.Tensor,
    mix_TN: torch.Tensor,
    ranks: tuple[int, ...],
    *,
    most: int | None = None,
    form: str | None = None,
) -> torch.Tensor:
    """The layer's output `[T,O]` in the dtype of x.

    a_RH, b_RO: A_i and B_iᵀ, one expert below the other, R = sum of `ranks`; in the dtype of x.
    mix_TN: an expert's weight for a token, its LoRA scale included; float32, or the dtype of x.
    most: how many weights of a token differ from zero, at most (the k of a top-k); None: any number.
    form: a key of FORMS; None chooses by what was measured.

    Differentiable in all tensors; what does not require grad costs nothing, and frozen experts keep no input for the
    backward. With `most`, a weight of zero gets no gradient. With B zero it is the base layer's output to the bit.
    """
    assert len(ranks) == mix_TN.shape[1], "as many ranks as experts"
    assert sum(ranks) == len(a_RH) == len(b_RO), "as many rows as the ranks say"
    tensors = (x_TH, weight_OH, bias_O, a_RH, b_RO, mix_TN)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        form = form or choose(x_TH, a_RH, b_RO, ranks, most, trains=a_RH.requires_grad or b_RO.requires_grad)
        return _LoraMixture.apply(*tensors, ranks, most, FORMS[form])
    form = form or choose(x_TH, a_RH, b_RO, ranks, most, trains=False)
    y_TO = base_layer(x_TH, weight_OH, bias_O)
    FORMS[form].forward(x_TH, a_RH, b_RO, mix_TN, ranks, y_TO, keep=False)
    return y_TO


def choose(
    x_TH: torch.Tensor,
    a_RH: torch.Tensor,
    b_RO: torch.Tensor,
    ranks: tuple[int, ...],
    most: int | None,
    *,
    trains: bool,
) -> str:
    """The faster form of those that serve."""
    if trains or most is None or not lora_chosen.serves(x_TH, a_RH, b_RO):
        return "concatenated"
    dtype, rows = x_TH.dtype, sum(ranks)
    own = most * (_OWN_PASS[dtype] + _OWN_ROW[dtype] * max(ranks))
    calls = _CALLS[dtype] / max(len(x_TH) * (x_TH.shape[1] + b_RO.shape[1]), 1)
    return "chosen" if own < _PASS[dtype] + _ROW[dtype] * rows + calls else "concatenated"


def reference(x_TH, weight_OH, bias_O, a_RH, b_RO, mix_TN, ranks):
    """The formula, expert after expert, in plain torch: what `lora_mixture` is compared with."""
    y_TO = F.linear(x_TH, weight_OH, bias_O)
    for a_rH, b_rO, mix_T in zip(a_RH.split(ranks), b_RO.split(ranks), mix_TN.unbind(1), strict=True):
        y_TO = y_TO + (mix_T[:, None] * F.linear(F.linear(x_TH, a_rH), b_rO.t())).to(y_TO.dtype)
    return y_TO


def base_layer(x_TH: torch.Tensor, weight_OH: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """W·x + bias, where it is large in memory that an earlier result has left. Not differentiable."""
    y_TO = empty(x_TH, len(x_TH), len(weight_OH))
    if bias_O is None:
        return torch.mm(x_TH, weight_OH.t(), out=y_TO)
    return torch.addmm(bias_O, x_TH, weight_OH.t(), out=y_TO)


class _LoraMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weight_OH, bias_O, a_RH, b_RO, mix_TN, ranks, most, form):
        x, weight, _, a, b, mix = ctx.needs_input_grad[:6]
        y_TO = base_layer(x_TH, weight_OH, bias_O)
        u = form.forward(x_TH, a_RH, b_RO, mix_TN, ranks, y_TO, keep=b or mix)
        experts = x or a or b or mix  # whose gradients need the experts at all
        ctx.save_for_backward(
            x_TH if weight or a else None,
            weight_OH if x else None,
            a_RH if experts else None,
            b_RO if experts else None,
            mix_TN if experts else None,
            u,
        )
        ctx.ranks, ctx.most, ctx.form = ranks, most, form
        return y_TO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TO):
        x_TH, weight_OH, a_RH, b_RO, mix_TN, u = ctx.saved_tensors
        x, weight, bias, a, b, mix = ctx.needs_input_grad[:6]
        grad_TO = grad_TO.contiguous()
        grad_x = torch.mm(grad_TO, weight_OH, out=empty(grad_TO, len(grad_TO), weight_OH.shape[1])) if x else None
        grad_a = grad_b = grad_mix = None
        if x or a or b or mix:
            grad_a, grad_b, grad_mix = ctx.form.backward(
                grad_TO, x_TH, a_RH, b_RO, mix_TN, ctx.ranks, u, grad_x, needs=(a, b, mix)
            )
        if mix and ctx.most is not None:
            grad_mix.masked_fill_(mix_TN == 0, 0)
        grad_weight = torch.mm(grad_TO.t(), x_TH) if weight else None
        grad_bias = grad_TO.sum(dim=0) if bias else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_mix, None, None, None
