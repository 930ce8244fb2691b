"""Nexus models for those who do not have this package: as a stock Qwen2-MoE, or with their modeling code beside them.

Every router of ours is linear in the token, so its folded rows are the weight of a plain one. Qwen2-MoE has the rest: a
softmax over all experts, raw probabilities, and a shared expert, which it multiplies by σ(w·x). A zero w makes that ½,
so the shared expert's last matrix is stored doubled: a power of two, nothing is rounded. Its attention is Llama's with
biases on q, k and v, which are zeros where the seed has none. Seeds with other blocks do not fit; they go with the
modeling code, which transformers runs for those who allow it (`trust_remote_code=True`).
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig, Qwen2MoeConfig

from moe_dist.errors import UserError
from moe_dist.methods.nexus.folders import ModelFolder, open_nexus
from moe_dist.methods.nexus.parts import Part, filled, mean_of, write_model
from moe_dist.methods.nexus.receipt import Receipt, measure_copy, measure_stock, router_of
from moe_dist.models.nexus import configuration_nexus, modeling_nexus, router_nexus
from moe_dist.models.shards import SHARD_BYTES, Entry

FITTING = ("llama", "mistral", "qwen2")
FORMS = ("auto", "qwen2_moe", "own")
NO_SHARED_WIDTH = 8  # of the shared expert of zeros that stands where the model has none
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "tie_word_embeddings", "rope_parameters", "attention_dropout", "num_experts", "num_experts_per_tok",
    "norm_topk_prob", "moe_intermediate_size", "router_aux_loss_coef", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def export(model: str | Path, out: str | Path, *, form: str = "auto", shard_bytes: int = SHARD_BYTES) -> Receipt:
    """Write the Nexus model in the folder `model` to the folder `out`, new or empty, for plain transformers.

    form: "qwen2_moe", a stock architecture, which serving engines know; "own", with modeling code beside the weights;
    "auto" takes the first where the seed's family allows it. Raises UserError with the reason where it does not.
    """
    opened = open_nexus("the model", model)
    reason = misfit(opened.config)
    if form == "qwen2_moe" and reason:
        raise UserError(f"{model} cannot be a stock qwen2_moe: {reason}. Export it with --form own")
    if form == "own" or reason:
        return _export_own(opened, out, shard_bytes)
    parts = tuple(part for key in opened.tensors for part in _stock_parts(key, opened))
    config = stock_config(opened.config)
    looks = partial(measure_stock, opened, parts, config)
    return write_model(out, parts, config, opened.folder, measure=looks, shard_bytes=shard_bytes)


def misfit(config: PreTrainedConfig) -> str | None:
    """Why a Nexus model cannot be expressed as a qwen2_moe; None where it can."""
    family = config.model_type.removeprefix("nexus_")
    if family not in FITTING:
        return f"the blocks of {family} are not Llama's (q and k norms, other norms, or scaled embeddings)"
    if getattr(config, "attention_bias", False):
        return "attention_bias=true puts a bias on the attention's output, which qwen2_moe does not have"
    return None


def stock_config(config: PreTrainedConfig) -> Qwen2MoeConfig:
    """The configuration of the same model as a qwen2_moe."""
    values = {key: deepcopy(getattr(config, key)) for key in KEPT}
    window = getattr(config, "sliding_window", None)
    if window:
        values |= {"use_sliding_window": True, "sliding_window": window}
        values["layer_types"] = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None)
    if head_dim and head_dim * config.num_attention_heads != config.hidden_size:
        values["head_dim"] = head_dim
    shared = config.moe_intermediate_size if config.use_shared_expert else NO_SHARED_WIDTH
    made = Qwen2MoeConfig(**values, qkv_bias=True, shared_expert_intermediate_size=shared)
    made.architectures = ["Qwen2MoeForCausalLM"]
    return made


def _stock_parts(key: str, model: ModelFolder) -> list[Part]:
    """What a tensor becomes; tensors that stock models have and ours do not come with the one beside them."""
    config, info = model.config, model.tensors[key]
    path, _, name = key.rpartition(".mlp.")
    if not path:
        parts = [mean_of(key, key, (model,))]
        projection = key.removesuffix(".weight")
        bias = f"{projection}.bias"
        if projection.endswith(("q_proj", "k_proj", "v_proj")) and bias not in model.tensors:
            entry = Entry(info.shape[:1], info.dtype)
            parts.append(Part(bias, entry, "zeros: the model has no such bias", make=filled(entry, 0.0)))
        return parts
    if name.startswith("gate."):
        return []  # the whole router becomes one weight, made where the experts' first tensor is met
    if name == "shared_expert.down_proj.weight":
        doubled = partial(_doubled, model, key)
        return [Part(key, Entry(info.shape, info.dtype), f"twice the model's: {key}", make=doubled)]
    parts = [mean_of(key, key, (model,))]
    if name == "experts.0.down_proj.weight":
        parts += _block_parts(f"{path}.mlp", config, info.dtype, model)
    return parts


def _block_parts(path: str, config: PreTrainedConfig, dtype: torch.dtype, model: ModelFolder) -> list[Part]:
    hidden = config.hidden_size
    rows = Entry((config.num_experts, hidden), dtype)
    gate = Entry((1, hidden), dtype)
    parts = [
        Part(f"{path}.gate.weight", rows, "the router's folded rows", make=partial(_folded, model, path, dtype)),
        Part(f"{path}.shared_expert_gate.weight", gate, "zeros: a factor of one half", make=filled(gate, 0.0)),
    ]
    if not config.use_shared_expert:
        for name, shape in (
            ("gate_proj", (NO_SHARED_WIDTH, hidden)),
            ("up_proj", (NO_SHARED_WIDTH, hidden)),
            ("down_proj", (hidden, NO_SHARED_WIDTH)),
        ):
            entry = Entry(shape, dtype)
            said = "zeros: the model has no shared expert"
            parts.append(Part(f"{path}.shared_expert.{name}.weight", entry, said, make=filled(entry, 0.0)))
    return parts


@torch.no_grad()
def _folded(model: ModelFolder, path: str, dtype: torch.dtype) -> torch.Tensor:
    return router_of(model.files, f"{path}.gate", model.config).rows().to(dtype)


def _doubled(model: ModelFolder, key: str) -> torch.Tensor:
    return 2 * model.read(key)


def _export_own(model: ModelFolder, out: str | Path, shard_bytes: int) -> Receipt:
    config = deepcopy(model.config)
    base, causal = modeling_nexus.MODELS[config.model_type.removeprefix("nexus_")]
    config.auto_map = {
        "AutoConfig": f"configuration_nexus.{type(model.config).__name__}",
        "AutoModel": f"modeling_nexus.{base.__name__}",
        "AutoModelForCausalLM": f"modeling_nexus.{causal.__name__}",
    }
    parts = tuple(mean_of(key, key, (model,)) for key in model.tensors)
    code = [Path(module.__file__) for module in (configuration_nexus, router_nexus, modeling_nexus)]
    looks = partial(measure_copy, model, parts, "export with modeling code")
    return write_model(out, parts, config, model.folder, measure=looks, files=code, shard_bytes=shard_bytes)
