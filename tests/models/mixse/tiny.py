"""Tiny dense models of many families, LoRA experts made by PEFT, and mixtures of them."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers

from moe_dist.models import load_model
from moe_dist.models.mixse import write_mixse_folder
from tests.models.tiny import VOCAB, randomise

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 8}
FAMILIES: dict[str, dict] = {
    "llama": {**_SIZES, **_HEAD, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_SIZES, **_HEAD, "sliding_window": 8},
    "qwen2": _SIZES,  # biases of its own
    "qwen3": {**_SIZES, **_HEAD},
    "gemma": {**_SIZES, **_HEAD},
    "gemma2": {**_SIZES, **_HEAD, "sliding_window": 8},
    "gemma3_text": {**_SIZES, **_HEAD, "sliding_window": 8},
    "olmo2": _SIZES,
}
SKILLS = ("code", "maths", "prose")
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomise(model, seed)
    return model.eval()


def adapter(base: Path, folder: Path, *, seed: int = 0, rank: int = 4, targets="all-linear", zero_b=False) -> Path:
    """A LoRA adapter with random A and B (of zeros where `zero_b`), written by PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if "lora_A" in name or ("lora_B" in name and not zero_b):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return folder


def mixture(
    family: str, folder: Path, *, dtype=torch.float32, ranks=(4, 4, 2), zero_b=False, changes=None, **options
) -> Path:
    """A MiXSE folder `folder/mixse`; beside it are `base` and the adapters, under the skills' names."""
    base = folder / "base"
    base_model(family, dtype=dtype, **(changes or {})).save_pretrained(base)
    adapters = {
        name: adapter(base, folder / name, seed=seed, rank=rank, zero_b=zero_b)
        for seed, (name, rank) in enumerate(zip(SKILLS, ranks, strict=True))
    }
    return write_mixse_folder(base, adapters, folder / "mixse", **options)


def mixse_model(family: str, folder: Path, **options):
    return load_model(mixture(family, folder, **options))
