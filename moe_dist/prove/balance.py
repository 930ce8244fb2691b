"""Routing losses of a plain process that sees all tokens of a step, from their formulas (see `moe.balance`).

Written a second time, token by token and without any of the code that is to be proved. A *sequence* is a document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_dist.config.schema import MoeSection


@dataclass(frozen=True)
class Routed:
    """What the routers said of one document: of each layer with experts logits `[T,E]` with graph and ids `[T,K]`."""

    logits: list[torch.Tensor]
    ids: list[torch.Tensor]


def routing_loss(passes: list[list[list[Routed]]], settings: MoeSection, scores: list[str]) -> torch.Tensor | float:
    """The routing losses of a step, coefficients applied: the mean over its micro-batches.

    passes: of each micro-batch, of each data rank, its documents. scores: "softmax" or "sigmoid" of each layer.
    """
    form, coef, z_coef = settings.balance_loss, settings.balance_coef, settings.z_loss_coef
    total, seen = 0.0, []
    for ranks in passes:
        documents = [document for rank in ranks for document in rank]
        seen += documents
        if z_coef:
            total = total + z_coef * _z_loss(documents)
        if form == "none" or not coef:
            continue
        layers = range(len(scores))
        if form == "hf":
            logits = tuple(torch.cat([document.logits[layer] for document in documents]) for layer in layers)
            balance = load_balancing_loss_func(logits, logits[0].shape[1], documents[0].ids[0].shape[1])
        elif form == "layer_micro":
            balance = sum(_switch(rank, rank, layer, scores[layer]) for rank in ranks for layer in layers) / len(ranks)
        elif form == "layer_sequence":
            ones = [[document] for document in documents]
            balance = sum(_switch(one, one, layer, scores[layer]) for one in ones for layer in layers) / len(ones)
        else:
            assert form == "layer_global", form
            balance = sum(_switch(documents, seen, layer, scores[layer]) for layer in layers)
        total = total + coef * balance
    return total / len(passes)


def _switch(documents: list[Routed], loads: list[Routed], layer: int, score: str) -> torch.Tensor:
    """E · Σ_i (share of the slots of `loads` that expert i got) · (its mean probability over `documents`)."""
    logits_TE = torch.cat([document.logits[layer] for document in documents])
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if score == "sigmoid":
        weights_TE = torch.sigmoid(logits_TE)
        probs_TE = weights_TE / weights_TE.sum(1, keepdim=True)
    else:
        probs_TE = F.softmax(logits_TE, dim=1)
    ids_N = torch.cat([document.ids[layer].flatten() for document in loads])
    experts = logits_TE.shape[1]
    load_E = torch.bincount(ids_N, minlength=experts).double() / len(ids_N)
    return experts * (load_E.to(probs_TE.dtype) * probs_TE.mean(0)).sum()


def _z_loss(documents: list[Routed]) -> torch.Tensor:
    """Σ over layers of the mean over tokens of (log Σ_i exp logit_ti)²."""
    layers = range(len(documents[0].logits))
    whole = [torch.cat([document.logits[layer] for document in documents]).float() for layer in layers]
    return sum(logits_TE.logsumexp(1).square().mean() for logits_TE in whole)
