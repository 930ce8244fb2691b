"""Nexus models (arXiv 2408.15901) over the dense families of transformers.

Everything but the MLPs is the family's own code, so attention, norms, cache and generation are the dense model's. Each
MLP becomes a block: the same MLP as a shared expert for every token, plus the routed experts that the router chose,

    y = FFN_shared(x) + Σ_k weight_k · FFN_{id_k}(x).

The stored names are those of Qwen2-MoE: `mlp.gate`, `mlp.shared_expert`, `mlp.experts.{i}.{gate,up,down}_proj`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GemmaForCausalLM,
    GemmaModel,
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    Olmo2ForCausalLM,
    Olmo2Model,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations import use_experts_implementation

from .configuration_nexus import (
    CONFIGS,
    NexusGemmaConfig,
    NexusLlamaConfig,
    NexusMistralConfig,
    NexusOlmo2Config,
    NexusQwen2Config,
    NexusQwen3Config,
)
from .router_nexus import KINDS, TEMPERATURE, LinearRouter, PaperRouter, PrototypeRouter


@use_experts_implementation
class NexusExperts(nn.Module):
    """The routed experts of a block, stacked: gate_up_proj `[E,2I,H]`, down_proj `[E,H,I]`."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The plain form, expert after expert."""
        y_TH = torch.zeros_like(hidden_TH, dtype=weights_TK.dtype)
        for expert in range(self.num_experts):
            rows, slots = torch.where(ids_TK == expert)
            gate_RI, up_RI = F.linear(hidden_TH[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            out_RH = F.linear(self.act_fn(gate_RI) * up_RI, self.down_proj[expert])
            y_TH = y_TH.index_add(0, rows, (weights_TK[rows, slots, None] * out_RH).to(y_TH.dtype))
        return y_TH.to(hidden_TH.dtype)


class NexusBlock(nn.Module):
    """Router, routed experts, and the dense model's own MLP as the shared expert (None without one)."""

    def __init__(self, config, shared_expert: nn.Module | None):
        super().__init__()
        self.gate = KINDS[config.router](config)
        self.experts = NexusExperts(config)
        self.shared_expert = shared_expert

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden `[...,H]` -> the same shape and dtype."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, ids_TK = self.gate(x_TH)
        y_TH = self.experts(x_TH, ids_TK, weights_TK)
        if self.shared_expert is not None:
            y_TH = y_TH + self.shared_expert(x_TH)
        return y_TH.view_as(hidden_states)


class NexusModel:
    """What turns a dense base model of transformers into a Nexus model; first among the bases of a class."""

    # Statistics of the seed model, not weights: rounding them would bend every logit.
    _keep_in_fp32_modules_strict = ("domain_embeddings", "input_mean", "input_length")

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = NexusBlock(config, layer.mlp if config.use_shared_expert else None)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, NexusExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, LinearRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, PaperRouter):
            init.normal_(module.w1, mean=0.0, std=std)
            init.normal_(module.w2, mean=0.0, std=std)
            init.normal_(module.domain_embeddings)
            if isinstance(module, PrototypeRouter):
                init.constant_(module.temperature, TEMPERATURE)
                init.zeros_(module.input_mean)
                init.constant_(module.input_length, self.config.hidden_size**0.5)  # after an RMS norm of weight one
        else:
            super()._init_weights(module)


class NexusCausalLM:
    """The same for a causal language model: the family's own, over a Nexus base model."""

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)  # the family's own constructor would build the dense model
        self.model = self.base_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class NexusLlamaModel(NexusModel, LlamaModel):
    config_class = NexusLlamaConfig


class NexusLlamaForCausalLM(NexusCausalLM, LlamaForCausalLM):
    config_class = NexusLlamaConfig
    base_class = NexusLlamaModel


class NexusMistralModel(NexusModel, MistralModel):
    config_class = NexusMistralConfig


class NexusMistralForCausalLM(NexusCausalLM, MistralForCausalLM):
    config_class = NexusMistralConfig
    base_class = NexusMistralModel


class NexusQwen2Model(NexusModel, Qwen2Model):
    config_class = NexusQwen2Config


class NexusQwen2ForCausalLM(NexusCausalLM, Qwen2ForCausalLM):
    config_class = NexusQwen2Config
    base_class = NexusQwen2Model


class NexusQwen3Model(NexusModel, Qwen3Model):
    config_class = NexusQwen3Config


class NexusQwen3ForCausalLM(NexusCausalLM, Qwen3ForCausalLM):
    config_class = NexusQwen3Config
    base_class = NexusQwen3Model


class NexusGemmaModel(NexusModel, GemmaModel):
    config_class = NexusGemmaConfig


class NexusGemmaForCausalLM(NexusCausalLM, GemmaForCausalLM):
    config_class = NexusGemmaConfig
    base_class = NexusGemmaModel


class NexusOlmo2Model(NexusModel, Olmo2Model):
    config_class = NexusOlmo2Config


class NexusOlmo2ForCausalLM(NexusCausalLM, Olmo2ForCausalLM):
    config_class = NexusOlmo2Config
    base_class = NexusOlmo2Model


MODELS = {
    "llama": (NexusLlamaModel, NexusLlamaForCausalLM),
    "mistral": (NexusMistralModel, NexusMistralForCausalLM),
    "qwen2": (NexusQwen2Model, NexusQwen2ForCausalLM),
    "qwen3": (NexusQwen3Model, NexusQwen3ForCausalLM),
    "gemma": (NexusGemmaModel, NexusGemmaForCausalLM),
    "olmo2": (NexusOlmo2Model, NexusOlmo2ForCausalLM),
}
for _family, (_base, _causal) in MODELS.items():
    _config = CONFIGS[_family]
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _base, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)
    register_checkpoint_conversion_mapping(
        _config.model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
    )
