"""Tiny random models of the named families, as folders that transformers itself has written."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

VOCAB = 96
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
}
CONFIGS: dict[str, dict] = {
    "mixtral": {**_BASE, "intermediate_size": 40, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_BASE,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 3,
    },
    "qwen3_moe": {
        **_BASE,
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 7,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "olmoe": {**_BASE, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v2": {**_BASE, **_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_BASE, **_LATENT},
    "gpt_oss": {
        **_BASE,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
}
WIDTH_KEY = {"mixtral": "intermediate_size", "olmoe": "intermediate_size", "gpt_oss": "intermediate_size"}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill every stored tensor with values that tell experts, rows and columns apart; norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            centre = 1.0 if tensor.dim() == 1 and "norm" in name else 0.0
            tensor.copy_(centre + 0.1 * noise)


def make_folder(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "50GB", **changes
) -> Path:
    """A random model of `family` in `folder`, saved by plain transformers."""
    config = transformers.AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.data = buffer.data.float()  # as on the hub, whatever the model's dtype
    randomise(model)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def batch(rows: int = 2, length: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
