"""One layer's experts on one device, ours and other people's, over the same weights.

Each contender is a function (x, ids, probs, gate_up `[E,2I,H]`, down `[E,H,I]`) -> y `[T,H]`. The recipes are written
from their description, in plain torch, with torch's own autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks._gpu_cases import Case, Tensors
from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import contiguous
from moe_dist.ops.grouped_mlp import Span, serving, swiglu
from moe_dist.parallel.grid import Grid

Experts = Callable[..., torch.Tensor]


def our_layer(case: Case, device: torch.device) -> tuple[MoEExperts, torch.Tensor, torch.Tensor]:
    """Our layer as it stands in a model, and its weights, which the others share."""
    spec, placement = ExpertSpec(case.experts, case.hidden, case.width), contiguous(case.experts, ranks=1)
    layer = MoEExperts(spec, placement, Grid.single(device), dtype=torch.bfloat16, device=device)
    weights = {name: parameter for name, parameter, _ in layer.expert_parameters()}
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in weights.values():
            for expert in parameter:  # one by one: a draw is fp32
                expert.normal_(0.0, parameter.shape[2] ** -0.5, generator=generator)

    return layer, weights["gate_up_proj"], weights["down_proj"]


def ours(layer: MoEExperts, backend: str) -> Experts:
    """Our layer with one of its back ends, or "auto"."""

    def run(x_TH, ids_TK, probs_TK, gate_up, down):
        layer.backend = backend
        return layer(x_TH, ids_TK, probs_TK)

    return run


def backends(t: Tensors, gate_up: torch.Tensor, down: torch.Tensor) -> list[str]:
    """Those of ours that compute such a layer."""
    return serving(t.x_TH, Span(gate_up, down, None, None, t.plan.counts_E.tolist()), swiglu)


def transformers_experts(case: Case, implementation: str) -> Experts:
    """transformers' own experts module with one of the registered implementations."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=case.experts,
        num_experts_per_tok=case.top_k,
        hidden_size=case.hidden,
        moe_intermediate_size=case.width,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)

    def run(x_TH, ids_TK, probs_TK, gate_up, down):
        experts.gate_up_proj, experts.down_proj = gate_up, down
        return experts(x_TH, ids_TK, probs_TK.to(x_TH.dtype))

    return run


def registered() -> list[str]:
    """What transformers has to choose from, ours left out."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ["eager", *sorted(set(ALL_EXPERTS_FUNCTIONS.valid_keys()) - {"eager", "moe_dist"})]


def transformers_with_ours(case: Case) -> Experts:
    import moe_dist.hf

    return transformers_experts(case, moe_dist.hf.NAME)


def torchtitan(x_TH, ids_TK, probs_TK, gate_up, down):
    """argsort of the slots, gather, grouped products, scores in fp32 on the outputs, scatter_add. Its w1 and w3 are one
    product here: with the weights that all share, two would cost it a sum of their padded gradients."""
    top_k, flat_N = ids_TK.shape[1], ids_TK.view(-1)
    order_N = torch.argsort(flat_N, stable=True)
    counts_E = torch.zeros(len(down), dtype=torch.int64, device=flat_N.device)
    ends_E = counts_E.scatter_add_(0, flat_N, torch.ones_like(flat_N)).cumsum(0).to(torch.int32)
    wide_NH = (order_N // top_k)[:, None].expand(-1, x_TH.shape[1])
    rows_NH = torch.gather(x_TH, 0, wide_NH)
    gate_NI, up_NI = F.grouped_mm(rows_NH, gate_up.transpose(1, 2), offs=ends_E).chunk(2, dim=1)
    y_NH = F.grouped_mm(F.silu(gate_NI) * up_NI, down.transpose(1, 2), offs=ends_E)
    weighted_NH = (y_NH.float() * probs_TK.view(-1)[order_N][:, None]).to(y_NH.dtype)
    return torch.zeros_like(x_TH).scatter_add(0, wide_NH, weighted_NH)


def megatron_core(x_TH, ids_TK, probs_TK, gate_up, down):
    """A mask [T,E] sorted whole, index_select, the probabilities at the activation, scatter_add without them."""
    tokens, experts = len(x_TH), len(down)
    mask_TE = torch.zeros(tokens, experts, dtype=torch.bool, device=x_TH.device).scatter_(1, ids_TK, True)
    dense_TE = torch.zeros(tokens, experts, device=x_TH.device).scatter(1, ids_TK, probs_TK)
    mask_ET = mask_TE.t().contiguous()
    ends_E = mask_ET.sum(1).cumsum(0).to(torch.int32)
    order_N = torch.argsort(mask_ET.view(-1), descending=True, stable=True)[: ids_TK.numel()]
    token_of_row_N = order_N % tokens
    rows_NH = x_TH.index_select(0, token_of_row_N)
    factor_N = dense_TE.t().contiguous().view(-1)[order_N]
    gate_NI, up_NI = F.grouped_mm(rows_NH, gate_up.transpose(1, 2), offs=ends_E).chunk(2, dim=1)
    a_NI = (F.silu(gate_NI.float()) * up_NI.float() * factor_N[:, None]).to(x_TH.dtype)
    y_NH = F.grouped_mm(a_NI, down.transpose(1, 2), offs=ends_E)
    wide_NH = token_of_row_N[:, None].expand(-1, x_TH.shape[1])
    return torch.zeros_like(x_TH).scatter_add(0, wide_NH, y_NH)


def bare_products(t: Tensors, gate_up: torch.Tensor, down: torch.Tensor) -> Callable[[], object]:
    """The six grouped products of a forward and backward, on rows that are there: a bound for any layer."""
    ends_E = t.plan.counts_E.cumsum(0).to(torch.int32)
    x_NH, a_NI, z_NF = (
        torch.randn(t.case.rows, size, device=down.device).to(torch.bfloat16)
        for size in (t.case.hidden, t.case.width, 2 * t.case.width)
    )
    gate_up, down = gate_up.detach(), down.detach()

    def run():
        F.grouped_mm(x_NH, gate_up.transpose(1, 2), offs=ends_E)
        F.grouped_mm(a_NI, down.transpose(1, 2), offs=ends_E)
        F.grouped_mm(x_NH, down, offs=ends_E)  # the gradient of a, from one of y
        F.grouped_mm(z_NF, gate_up, offs=ends_E)
        F.grouped_mm(z_NF.t(), x_NH, offs=ends_E)
        F.grouped_mm(x_NH.t(), a_NI, offs=ends_E)

    return run
