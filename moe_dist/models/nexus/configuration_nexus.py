"""Configurations of Nexus models: those of the dense families, and what the experts and the router add to them."""

from __future__ import annotations

from dataclasses import dataclass, field

from huggingface_hub.dataclasses import strict
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Olmo2Config, Qwen2Config, Qwen3Config

ROUTERS = ("prototype", "paper", "linear")


@dataclass(kw_only=True)
class NexusFields:
    """The keys of `config.json` that a dense model does not have.

    num_experts: routed experts, without the shared one. num_experts_per_tok: how many of them a token gets.
    norm_topk_prob: their weights are divided by their sum (else raw probabilities of the softmax over all experts).
    use_shared_expert: every token also goes through an expert of its own, in which a seed model's MLP lives on.
    router: see `router_nexus`. domain_dim: length m of a domain embedding (paper, prototype).
    renormalised: ids of experts whose rows are made as long as the others are on average (paper).
    router_aux_loss_coef: the coefficient of the load-balance loss that the method asks for.
    expert_names: of the routed experts, in order. domain_space: which embedding space the domain embeddings live in
    (embedder, dimension, fingerprint); an expert can only be added from the same.
    """

    num_experts: int = 4
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    use_shared_expert: bool = True
    router: str = "prototype"
    domain_dim: int | None = None
    renormalised: list[int] = field(default_factory=list)
    router_aux_loss_coef: float = 0.05
    expert_names: list[str] = field(default_factory=list)
    domain_space: dict | None = None

    @property
    def moe_intermediate_size(self) -> int:
        """Width of an expert: that of the dense model's MLP, which it was."""
        return self.intermediate_size

    def validate_nexus(self) -> None:
        """Called by `strict` whenever a configuration is made."""
        if self.router not in ROUTERS:
            raise ValueError(f"router={self.router!r}: has to be one of {', '.join(ROUTERS)}")
        if self.num_experts < 1 or not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok}: of {self.num_experts} experts")
        if self.router == "prototype" and self.domain_dim not in (None, self.hidden_size):
            raise ValueError(
                f"domain_dim={self.domain_dim}: a prototype is a point among the router's inputs, "
                f"which have {self.hidden_size} dimensions"
            )
        strange = [expert for expert in self.renormalised if not 0 <= expert < self.num_experts]
        if self.renormalised and (self.router != "paper" or strange or len(self.renormalised) == self.num_experts):
            raise ValueError(f"renormalised={self.renormalised}: ids of some of the experts of a paper router")
        if self.expert_names and len(self.expert_names) != self.num_experts:
            raise ValueError(f"expert_names: {len(self.expert_names)} names for {self.num_experts} experts")
        if getattr(self, "mlp_bias", False):
            raise ValueError("mlp_bias=true: routed experts have no biases")


@strict
class NexusLlamaConfig(NexusFields, LlamaConfig):
    model_type = "nexus_llama"


@strict
class NexusMistralConfig(NexusFields, MistralConfig):
    model_type = "nexus_mistral"


@strict
class NexusQwen2Config(NexusFields, Qwen2Config):
    model_type = "nexus_qwen2"


@strict
class NexusQwen3Config(NexusFields, Qwen3Config):
    model_type = "nexus_qwen3"


@strict
class NexusGemmaConfig(NexusFields, GemmaConfig):
    model_type = "nexus_gemma"


@strict
class NexusOlmo2Config(NexusFields, Olmo2Config):
    model_type = "nexus_olmo2"


CONFIGS = {
    "llama": NexusLlamaConfig,
    "mistral": NexusMistralConfig,
    "qwen2": NexusQwen2Config,
    "qwen3": NexusQwen3Config,
    "gemma": NexusGemmaConfig,
    "olmo2": NexusOlmo2Config,
}
MODEL_TYPES = tuple(config.model_type for config in CONFIGS.values())
