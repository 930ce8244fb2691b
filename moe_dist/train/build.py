"""From the configuration to a model: first its plan, which needs no weights, then the model with this rank's share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from moe_dist.config.expert_files import read_summary
from moe_dist.config.schema import RunConfig, TrainableSection
from moe_dist.data.offline_tokenizer import OFFLINE, offline_tokenizer
from moe_dist.errors import UserError
from moe_dist.models.beside import compute_shared_experts_beside
from moe_dist.models.cut import cut
from moe_dist.models.initialising import init_model
from moe_dist.models.loading import load_model, resolve_folder
from moe_dist.models.lora import PARAMETERS as LORA_PARAMETERS
from moe_dist.models.lora import inject_lora
from moe_dist.models.mixse.spec import read_spec
from moe_dist.models.nexus.configuration_nexus import CONFIGS as DENSE_FAMILIES
from moe_dist.models.recompute import enable_recompute
from moe_dist.models.skeleton import build_skeleton, make_config, read_config
from moe_dist.models.surgery import Seating, moe_layers, swap
from moe_dist.moe.placement import balance, from_lists
from moe_dist.parallel.grid import Grid
from moe_dist.train.base_states import check_base_states, keep_base_states
from moe_dist.train.trainable import Selection, freeze, layer_index, select


@dataclass(frozen=True)
class ModelPlan:
    """What will be built: `skeleton` is the whole model on the meta device with this rank's seats in its
    experts layers; `local` is what this rank holds of it, and `all_stages` what the ranks with its places in the other
    pipeline stages hold besides (the same object where nothing is cut). What trains is marked in all of them.

    folder: where the weights come from; None for a random initialisation. placement: as `load_model` takes it.
    """

    skeleton: nn.Module
    local: nn.Module
    all_stages: nn.Module
    selection: Selection
    placement: Seating
    folder: Path | None


def plan_model(config: RunConfig, grid: Grid) -> ModelPlan:
    """Resolve architecture, trainable set and placement. Reads a folder's config.json and no weights.

    Raises UserError for everything that is wrong with `model`, `trainable` and `parallel.placement`.
    """
    if config.model.trust_remote_code:
        raise UserError(
            "model.trust_remote_code: models with code of their own are not supported; "
            "use a model that transformers itself has"
        )
    folder = None if config.model.path is None else resolve_folder(config.model.path)
    if folder is None:
        architecture = make_config(dict(config.model.config), where="model.config")
    else:
        architecture = read_config(folder)
    dtype = getattr(torch, config.model.dtype or "float32")
    dense = _dense_allowed(config, architecture)

    def build(**where) -> tuple[nn.Module, list]:
        skeleton = build_skeleton(architecture, dtype)
        skeleton.tie_weights(recompute_mapping=False)  # a tied tensor is one parameter, under one name
        layers = swap(skeleton, grid, device="meta", dense=dense, **where)
        if config.lora.rank:
            inject_lora(skeleton, config.lora)
        return skeleton, layers

    if config.lora.rank and read_spec(architecture) is not None:
        raise UserError("lora: this model is a mixture; train a further expert on its base, and compose anew")
    skeleton, layers = build()
    routers = [layer.origin.router[0] for _, layer in layers if layer.origin.router is not None]
    trainable = TrainableSection(include=list(LORA_PARAMETERS)) if config.lora.rank else config.trainable
    selection = select(trainable, skeleton, routers)
    check_base_states(config, skeleton, selection)
    placement = _placement(config, layers, selection, grid)
    # Again with the placement now known, so that the skeleton has the spans that the model will have.
    where = {"trainable": selection.experts, "placement": placement}
    skeleton, _ = build(**where)
    local = all_stages = skeleton
    if grid.slices > 1:
        local = all_stages = build(**where)[0]
        cut(all_stages, replace(grid, pipeline=1, pipeline_rank=0))
    if grid.pipeline > 1:
        local = build(**where)[0]
        cut(local, grid)
    for model in (skeleton, local, all_stages):
        freeze(model, selection)
    return ModelPlan(skeleton, local, all_stages, selection, placement, folder)


def build_model(config: RunConfig, plan: ModelPlan, grid: Grid) -> nn.Module:
    """The transformers model with this rank's experts, in training mode, frozen where the plan says so."""
    dense = _dense_allowed(config, plan.skeleton.config)
    where = {"trainable": plan.selection.experts, "placement": plan.placement, "dense": dense}
    if plan.folder is None:
        dtype = config.model.dtype or "float32"
        model = init_model(dict(config.model.config), grid, seed=config.model.seed, dtype=dtype, **where)
    else:
        model = load_model(plan.folder, grid, dtype=config.model.dtype, **where)
    if config.model.attention is not None:
        try:
            model.set_attn_implementation(config.model.attention)
        except (ValueError, ImportError) as error:
            raise UserError(f"model.attention={config.model.attention}: {error}") from None
    if config.lora.rank:
        inject_lora(model, config.lora)
    if config.model.base_states is not None:
        keep_base_states(config, model, plan.folder)
    freeze(model, plan.selection)
    for _, layer in moe_layers(model):
        layer.capacity_factor = config.moe.capacity_factor
        layer.dispatcher, layer.chunks = config.moe.dispatcher, config.moe.chunks
        layer.wide_sums = config.moe.wire == "float32"
        if config.moe.experts_backend != "measured":  # which the training loop does
            layer.backend = config.moe.experts_backend
    if config.train.recompute:
        enable_recompute(model)
    if _overlaps(config, grid):
        compute_shared_experts_beside(model)
    return model.train()


def _overlaps(config: RunConfig, grid: Grid) -> bool:
    """Whether shared experts compute while tokens travel; never with ZeRO 3 (see `config.checks`)."""
    if config.moe.overlap is None:
        return grid.device.type == "cuda" and grid.expert > 1 and config.parallel.zero_stage < 3
    return config.moe.overlap


def load_tokenizer(config: RunConfig, plan: ModelPlan):
    """The run's tokenizer: `model.tokenizer`, or the one beside the model. No code of its folder is run."""
    from transformers import AutoTokenizer

    rows = plan.skeleton.get_input_embeddings().num_embeddings
    if config.model.tokenizer == OFFLINE:
        return offline_tokenizer(config.data.cache_dir, vocab_size=rows)
    source = config.model.tokenizer or plan.folder
    if source is None:
        raise UserError(
            "model.tokenizer is not set, and an inline model.config has no tokenizer beside it; "
            f"name one, or take '{OFFLINE}'"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # the tokenizer classes raise many types
        raise UserError(f"no tokenizer can be loaded from {source}: {error}") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Some tokenizer classes make themselves out of nothing where their files are missing.
        raise UserError(f"{source} holds no tokenizer: what is there has no vocabulary; set model.tokenizer")
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer {source} has {len(tokenizer)} tokens, but the model embeds {rows}: "
            "they do not belong together"
        )
    return tokenizer


def _dense_allowed(config: RunConfig, architecture: PreTrainedConfig) -> bool:
    """Whether a model without routed experts is meant: what Nexus upcycles is trained here, and any base of LoRA."""
    return config.lora.rank > 0 or architecture.model_type in DENSE_FAMILIES


def _placement(config: RunConfig, layers: list, selection: Selection, grid: Grid) -> Seating:
    if config.parallel.placement == "contiguous" or grid.expert == 1:
        return "contiguous"
    loads = {name: [1.0] * layer.spec.num_experts for name, layer in layers}
    if config.parallel.placement_scores is not None:
        loads = _measured(config.parallel.placement_scores, loads)
    placed = {}
    for name, load in loads.items():
        train = selection.experts[name]
        lists = balance(load, ranks=grid.expert, trainable=train, spare=config.parallel.spare_experts)
        placed[name] = from_lists(
            lists, num_experts=len(load), trainable=train, load_E=load, ranks_per_node=grid.node_size
        )
    return placed


def _measured(path: str, loads: dict[str, list[float]]) -> dict[str, list[float]]:
    """How much each expert of each layer was used, from the token scores in a file."""
    scores = read_summary(path).of_kind("token", where=path)
    measured = {}
    for layer, load in loads.items():
        index = str(layer_index(layer))
        measured[layer] = scores.get(index, [])
        if len(measured[layer]) != len(load):
            raise UserError(
                f"parallel.placement_scores={path}: {len(measured[layer])} scores for layer {index}, which has "
                f"{len(load)} experts in this model; take scores of this model"
            )
    return measured
