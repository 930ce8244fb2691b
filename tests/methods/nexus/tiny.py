"""Tiny dense models of the families that Nexus upcycles, and Nexus models made by hand from them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from moe_dist.models.nexus import modeling_nexus  # noqa: F401 - makes Nexus models known to transformers
from moe_dist.models.nexus.configuration_nexus import CONFIGS
from tests.models.tiny import VOCAB, randomise

DENSE = tuple(CONFIGS)
ROUTERS = ("prototype", "paper", "linear")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def sizes(family: str) -> dict:
    """SIZES without what the family's configuration does not have."""
    return {name: value for name, value in SIZES.items() if name != "head_dim" or family not in ("qwen2", "olmo2")}


def dense_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    config = transformers.AutoConfig.for_model(family, **{**sizes(family), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomise(model, seed)
    return model.eval()


def dense_folder(family: str, folder: Path, *, seed: int = 0, **options) -> Path:
    dense_model(family, seed=seed, **options).save_pretrained(folder)
    return folder


def nexus_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields):
    """A random Nexus model, stock experts, whose router has statistics that make sense."""
    config = CONFIGS[family](**{**sizes(family), "num_experts": 4, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomise(model, seed)
    for layer in model.model.layers:
        if config.router == "prototype":
            with torch.no_grad():
                layer.mlp.gate.temperature.fill_(8.0)
                layer.mlp.gate.input_length.fill_(config.hidden_size**0.5)
        for buffer in layer.mlp.gate.buffers():
            buffer.data = buffer.data.float()  # as `load_model` and `from_pretrained` keep them
    return model.eval()


def nexus_folder(family: str, folder: Path, **options) -> Path:
    nexus_model(family, **options).save_pretrained(folder)
    return folder


def copies_of(dense, *, copies: int, **fields):
    """A Nexus model all of whose experts, the shared one included, are the dense model's MLP."""
    values = {**dense.config.to_dict(), "num_experts": copies, **fields}
    model_type = values.pop("model_type")
    values.pop("architectures")
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[model_type](**values), dtype=dense.dtype)
    given = dense.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in given:
                tensor.copy_(given[name])
        for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
            if ours.mlp.shared_expert is not None:
                ours.mlp.shared_expert.load_state_dict(theirs.mlp.state_dict())
            up = torch.cat([theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight])
            ours.mlp.experts.gate_up_proj.copy_(up.expand_as(ours.mlp.experts.gate_up_proj))
            ours.mlp.experts.down_proj.copy_(theirs.mlp.down_proj.weight.expand_as(ours.mlp.experts.down_proj))
    return model.eval()
