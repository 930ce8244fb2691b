"""Nexus blocks for the judge of a proof, written from their formulas and not from the modules that train.

logits = x · e_i, p = softmax over all experts in float32; the K largest, divided by their sum with norm_topk_prob
y = FFN_shared(x) + Σ_k p_k · FFN_k(x),  FFN(x) = W_down (act(W_gate x) ∘ (W_up x))

linear     e_i is a weight
paper      e_i = W2 · SwiGLU(W1 d_i); of the experts in `renormalised` as long as the others are on average
prototype  e_i = (τ/c) · unit of (d_i + W2 · SwiGLU(W1 d_i)) without its part along μ
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from moe_dist.models.nexus.configuration_nexus import MODEL_TYPES


def take_formulas(model: nn.Module) -> None:
    """Let the blocks of a Nexus model, and their routers and experts, compute what is written here; nothing for other
    models. Modules, parameters and hooks stay."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        return
    for layer in model.model.layers:
        layer.mlp.forward = partial(_block, layer.mlp, config)
        layer.mlp.gate.forward = partial(_route, layer.mlp.gate, config)
        layer.mlp.experts.forward = partial(_experts, layer.mlp.experts, config)


def _block(block: nn.Module, config, hidden_BLH: torch.Tensor) -> torch.Tensor:
    x_TH = hidden_BLH.flatten(0, -2)
    _, weights_TK, ids_TK = block.gate(x_TH)
    y_TH = block.experts(x_TH, ids_TK, weights_TK)
    if config.use_shared_expert:
        shared, act = block.shared_expert, ACT2FN[config.hidden_act]
        inner_TI = act(F.linear(x_TH, shared.gate_proj.weight)) * F.linear(x_TH, shared.up_proj.weight)
        y_TH = y_TH + F.linear(inner_TI, shared.down_proj.weight)
    return y_TH.view_as(hidden_BLH)


def _experts(experts: nn.Module, config, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor):
    """Every expert for every token, weighted by what the router gave it: zero for most."""
    share_TE = torch.zeros(len(x_TH), config.num_experts, dtype=weights_TK.dtype).to(weights_TK)
    share_TE = share_TE.scatter_add(1, ids_TK, weights_TK)
    act, y_TH = ACT2FN[config.hidden_act], torch.zeros_like(x_TH)
    for expert in range(config.num_experts):
        gate_TI, up_TI = (x_TH @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
        y_TH = y_TH + share_TE[:, expert, None] * ((act(gate_TI) * up_TI) @ experts.down_proj[expert].T)
    return y_TH.to(x_TH.dtype)


def _route(router: nn.Module, config, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    logits_TE = x_TH.to(wide) @ rows(router, config).to(wide).T
    probs_TE = torch.exp(logits_TE - logits_TE.logsumexp(1, keepdim=True))
    weights_TK, ids_TK = probs_TE.topk(config.num_experts_per_tok, dim=1)
    if config.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    return logits_TE, weights_TK, ids_TK


def rows(router: nn.Module, config) -> torch.Tensor:
    """e `[E,H]`, float32 or wider."""
    tensors = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    t = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()}
    if config.router == "linear":
        return t["weight"]
    d_EM = t["domain_embeddings"].to(t["w1"].dtype)
    gate_EH, up_EH = (d_EM @ t["w1"].T).chunk(2, dim=1)
    rows_EH = (gate_EH * torch.sigmoid(gate_EH) * up_EH) @ t["w2"].T
    if config.router == "prototype":
        moved_EH, mean_H = d_EM + rows_EH, t["input_mean"].to(d_EM.dtype)
        if mean_H.any():
            moved_EH = moved_EH - torch.outer(moved_EH @ mean_H, mean_H) / mean_H.square().sum()
        return t["temperature"] / t["input_length"] * moved_EH / moved_EH.norm(dim=1, keepdim=True)
    short = torch.zeros(len(d_EM), dtype=torch.bool, device=d_EM.device)
    short[list(config.renormalised)] = True
    if config.renormalised:
        lengths_E1 = rows_EH.norm(dim=1, keepdim=True)
        rows_EH = torch.where(short[:, None], rows_EH / lengths_E1 * lengths_E1[~short].mean(), rows_EH)
    return rows_EH
