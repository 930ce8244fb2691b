"""A tiny model of any MoE family of transformers, from its configuration class and a table of small sizes.

A configuration is constructed with its defaults, and every field whose name is known gets a small value; nested
configurations (text, vision, audio) likewise. `CHANGES` holds what a family needs beyond that.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from moe_dist.models.families import find_experts, interface_models

VOCAB = 96

SIZES: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    # latent attention and its indexers
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "sliding_window": 16,
    # linear attention, state spaces, latent hashes
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    # vision and audio towers
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "output_dim": 32,
    "downsample_hidden_size": 8,
    "num_position_embeddings": 16,
    "projection_intermediate_size": 32,
    "depth": 1,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "out_hidden_size": 32,
}
_MULTI_HEAD = {"num_key_value_heads": 4}
CHANGES: dict[str, dict[str, object]] = {
    "axk1": _MULTI_HEAD,
    "axk2": _MULTI_HEAD,
    "bailing_hybrid": {**_MULTI_HEAD, "layer_group_size": 2},
    "beam": {"num_hidden_layers": 4},
    "deepseek_ocr2": {
        **_MULTI_HEAD,
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {"sam_config": {"global_attn_indexes": [0]}},
    },
    "deepseek_v2": _MULTI_HEAD,
    "deepseek_v3": _MULTI_HEAD,
    "deepseek_v32": _MULTI_HEAD,
    "dots3_note": _MULTI_HEAD,
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 16],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        }
    },
    "flint": {"num_hidden_layers": 4},
    "gemma4": {"enable_moe_block": True},
    "glm4_moe_lite": _MULTI_HEAD,
    "glm4v_moe": {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}}},
    "glm5_next": {**_MULTI_HEAD, "num_hidden_layers": 4, "qk_rope_head_dim": 0, "index_kpool": 4},
    "glm_moe_dsa": _MULTI_HEAD,
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_state": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "mistral4": _MULTI_HEAD,
    "mistral_large4": _MULTI_HEAD,
    "nemotron_h": {"n_groups": 2},
    "zaya": {"num_experts_per_tok": 1},
}

# Fields that a model class reads although its configuration class does not declare them, by experts class.
UNDECLARED: dict[str, dict[str, object]] = {
    "Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": 40},
}


def tiny_config(
    cls: type[PreTrainedConfig], changes: dict[str, object], own: dict[str, object] | None = None
) -> PreTrainedConfig:
    """An instance of `cls` with small sizes.

    `changes` are applied to it and to the configurations inside it, where they have such a field; a change under the
    name of a nested configuration is a table for that one alone. `own` are for this one alone.
    """
    plain = {name: value for name, value in changes.items() if not name.endswith("_config")}
    known = inspect.signature(cls.__init__).parameters.keys() | cls.__dataclass_fields__.keys()
    values = {name: value for name, value in {**SIZES, **plain}.items() if name in known}
    values |= own or {}
    for name, inner in cls.sub_configs.items():
        defaults = getattr(cls, "sub_configs_defaults", {}).get(name)
        if inner is transformers.AutoConfig:
            if defaults is None or defaults.model_type is None:
                continue
            inner = transformers.CONFIG_MAPPING[defaults.model_type]
        given = {} if defaults is None else {k: v for k, v in defaults.init_kwargs.items() if k not in SIZES}
        table = changes.get(name, {})
        nested = {key: value for key, value in table.items() if key.endswith("_config")}
        values[name] = tiny_config(inner, given | plain | nested, {k: v for k, v in table.items() if k not in nested})
    return cls(**values)


def model_classes(family: str) -> list[type[PreTrainedModel]]:
    """The classes of a family that may hold experts, the most useful one first."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
    ]
    order = ("ForCausalLM", "ForConditionalGeneration", "TextModel", "Model", "ForTokenClassification")

    def rank(cls: type) -> tuple[int, int]:
        return next((i for i, end in enumerate(order) if cls.__name__.endswith(end)), len(order)), found.index(cls)

    return sorted((cls for cls in found if not cls.__name__.endswith("PreTrainedModel")), key=rank)


def experts_classes() -> list[tuple[str, str]]:
    """(family, class) of every experts class that the installed transformers marks with its experts interface."""
    root = Path(transformers.__file__).parent / "models"
    marked = re.compile(r"^@use_experts_implementation\b.*\nclass (\w+)", re.MULTILINE)
    found = []
    for family in interface_models():
        source = (root / family / f"modeling_{family}.py").read_text(encoding="utf-8")
        found += [(family, name) for name in marked.findall(source)]
    return found


def tiny_model(family: str, experts: str) -> PreTrainedModel:
    """A random model of `family` that holds the class `experts`. Raises what the last of its classes raises."""
    torch.manual_seed(0)
    error: Exception = LookupError(f"no model class of {family} holds {experts}")
    for cls in model_classes(family):
        try:
            config = tiny_config(cls.config_class, CHANGES.get(family, {}), UNDECLARED.get(experts))
            with torch.device("meta"):
                held = {type(module).__name__ for _, module in find_experts(cls(config))}
            if experts not in held:
                continue
            model = cls._from_config(config, dtype=torch.float32)
        except Exception as reason:
            error = reason
            continue
        with torch.no_grad():
            for _, module in find_experts(model):
                for parameter in module.parameters():
                    parameter.zero_()  # not every family's rule initialises its experts
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.05 * torch.randn_like(tensor))
        return model.eval()
    raise error
