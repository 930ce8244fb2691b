"""Our experts for any transformers model, in one line: importing this registers the implementation "moe_dist".

    import moe_dist.hf
    model.set_experts_implementation("moe_dist")      # or from_pretrained(..., experts_implementation="moe_dist")

The model keeps its modules, parameters and files; only what an experts module computes goes through our permute and
grouped experts. So whatever works on the model goes on working: Trainer, TRL, PEFT, `generate`, gradient checkpointing,
transformers' own expert parallelism. Training chosen experts alone needs more than a forward: see `docs/esft.md`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_dist.models.families import activation_of, stock_names_of
from moe_dist.moe.dispatch import DispatchPlan, stay_here
from moe_dist.moe.hop import slots_of
from moe_dist.moe.mixture import How, mixture, weighted_after

NAME = "moe_dist"


@torch.compiler.disable  # how many rows an expert gets is read on the host, as in transformers' own loop
def experts_forward(
    experts: nn.Module, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """hidden `[T,H]`, chosen experts `[T,K]`, their weights `[T,K]` -> `[T,H]`, dtype of hidden.

    experts: a module of a stock model that follows transformers' experts interface. Computes in the dtype that eager
    experts compute in: autocast's where it is on, else that of the weights. Sums over k are in fp32 (float64 in
    float64). Raises UserError for an activation that has parameters.
    """
    # Under transformers' expert parallelism an id of num_experts marks a slot that another rank serves.
    ids_TK = ids_TK.masked_fill(ids_TK >= experts.num_experts, -1)
    weights = {ours: getattr(experts, stock) for ours, stock in stock_names_of(experts).items()}
    if experts.is_transposed:
        weights |= {name: weights[name].transpose(1, 2) for name in ("gate_up_proj", "down_proj")}
    device = hidden_TH.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weights["down_proj"].dtype
    with torch.autocast(device, enabled=False):
        names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
        span = [weights[name].to(dtype) if name in weights else None for name in names]
        how = How(activation_of(experts), (experts.num_experts,), hidden_TH.dtype)
        if not getattr(experts, "has_post_expert_norm", False):  # an older transformers has no such mark
            return _mixture(hidden_TH, ids_TK, weights_TK, how, span)
    # With a norm of each expert's output row before it is weighted: each slot is a token of its own.
    return weighted_after(
        lambda x_NH, ids_N1, ones_N1: _mixture(x_NH, ids_N1, ones_N1, how, span),
        experts.post_expert_norm,
        hidden_TH,
        ids_TK,
        weights_TK,
    )


def _mixture(hidden_TH, ids_TK, weights_TK, how: How, span: list[torch.Tensor | None]) -> torch.Tensor:
    part = stay_here(slots_of(ids_TK, weights_TK), how.held[0])
    return mixture(hidden_TH, weights_TK, DispatchPlan([part], part.seats.counts_E), how, [span])


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
