"""Cached generation of a MiXSE model with `block_input` against its base, stock transformers, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks._harness import interleaved, row
from moe_dist.models.mixse.install import install, mixse_layers
from moe_dist.models.mixse.spec import MixseSpec

LAYERS, BATCH, PROMPT, NEW = 8, 8, 64, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def mixture_generation(full: bool) -> Iterator[dict]:
    """Rows in milliseconds a generated token of the batch, prompts included; rank 8, top-1."""
    sizes = [(1024, 4)] if not full else [(512, 4), (1024, 4), (1024, 16), (1024, 64)]
    for hidden, experts in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            base, mixture = models(hidden, experts, dtype)
            prompts_BL = torch.randint(0, base.config.vocab_size, (BATCH, PROMPT))
            ours, peer = interleaved(
                [partial(generate, model, prompts_BL) for model in (mixture, base)],
                rounds=15 if full else 7,
                seconds=60 if full else 20,
            )
            case = f"mixture, H{hidden}, {LAYERS} layers, {experts} experts, batch {BATCH}, {str(dtype)[6:]}"
            yield row(case, ours / (BATCH * NEW), peer / (BATCH * NEW), "its base, stock", unit="ms/token")


@torch.no_grad()
def models(hidden: int, experts: int, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(a dense model, the same with experts in all its linear layers), random; what both have they share."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
    )
    base = LlamaForCausalLM(config).to(dtype).eval()
    mixture = copy.deepcopy(base, {id(shared): shared for shared in base.parameters()})
    names, count = tuple(f"expert{i}" for i in range(experts)), experts
    spec = MixseSpec(experts=names, ranks=(8,) * count, scales=(2.0,) * count, targets=TARGETS)
    mixture.config.mixse = spec.to_dict()
    install(mixture, "cpu")
    for _, layer in mixse_layers(mixture):
        nn.init.normal_(layer.experts_a, std=hidden**-0.5)
        nn.init.normal_(layer.experts_b, std=0.01)
    nn.init.normal_(mixture.mixse_router.weight)
    return base, mixture.eval()


def generate(model: PreTrainedModel, prompts_BL: torch.Tensor) -> torch.Tensor:
    """Prompts and exactly NEW greedy tokens for each of them."""
    return model.generate(
        prompts_BL,
        attention_mask=torch.ones_like(prompts_BL),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
