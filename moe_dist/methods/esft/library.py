"""ESFT in somebody else's training loop: two calls on a plain transformers model.

    summary = score_experts(model, batches)
    apply_selection(model, choose(summary.of_kind("token"), p=0.2))

After them the model is trained as any other, by transformers' Trainer, what is built on it, Accelerate, or by hand:
only the selected experts require a gradient, and `model.save_pretrained(folder)` writes the adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from moe_dist.config.expert_files import ExpertConfig, Summary, read_expert_config
from moe_dist.errors import UserError
from moe_dist.methods.esft.adapter_folder import find_base
from moe_dist.methods.esft.adapter_names import AdapterNames, check_whole
from moe_dist.methods.esft.library_experts import replace_experts
from moe_dist.methods.esft.library_saving import Applied, attach
from moe_dist.methods.esft.score import RoutingScores
from moe_dist.methods.esft.selection import Choice
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.train.trainable import is_shared_expert

SAMPLE_TOKENS = 131_072  # the paper's: 32 sequences of 4,096

Selection = ExpertConfig | Choice | Mapping[int | str, Sequence[int]] | str | Path


@torch.no_grad()
def score_experts(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    tokens: int = SAMPLE_TOKENS,
    score_norm: str = "per_token",
    count_tokens: str = "no_pad",
) -> Summary:
    """Token and gate scores of every expert over a sample of a task, from the model as it is.

    batches: what the model is trained on, as a data loader gives it: `input_ids` `[B,L]`, and where there are any
    `attention_mask`, `labels` and other inputs of the model. Whole batches are run until `tokens` real tokens are
    through. The other options are those of `moe-dist esft score`.
    Each process scores what it is given: in a distributed run give all of them the same batches.
    Raises UserError for a model without experts, or one whose weights ZeRO 3 has already spread.
    """
    for name, parameter in model.named_parameters():
        check_whole(name, parameter)
    modes = [(module, module.training) for module in model.modules()]
    seen = 0
    try:
        model.eval()
        with RoutingScores(model, Grid.single(model.device), count_tokens=count_tokens) as listener:
            for batch in batches:
                inputs = {key: value.to(model.device) for key, value in batch.items() if torch.is_tensor(value)}
                mask = inputs.get("attention_mask")
                mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
                listener.see({"attention_mask": mask, **inputs})
                # The language model's head has nothing to say about the routing.
                labels = inputs.pop("labels", None)
                model.base_model(**inputs, use_cache=False)
                seen += int(mask.sum()) if count_tokens == "no_pad" else int((labels != -100).sum())
                if seen >= tokens:
                    break
    finally:
        for module, training in modes:
            module.training = training
    base = find_base(model)
    named = {"name": None, "fingerprint": None}
    if base is not None:
        named = {"name": str(base.folder), "fingerprint": base.fingerprint}
    return listener.summary(score_norm=score_norm, extra={"model": named})


def apply_selection(model: PreTrainedModel, selection: Selection) -> PreTrainedModel:
    """Turn a plain transformers model into its ESFT form, in place; returns it.

    selection: a `Choice`, an `ExpertConfig`, {layer index: ids}, or the file of an expert config. In a distributed
    run every process calls it with the same one.

    The selected experts become parameters of their own, in float32 whatever the model's dtype: they are their own
    masters, and are rounded to the model's dtype where they compute. Everything else keeps its dtype and does not
    require a gradient. `model.save_pretrained` writes the adapter from then on, and `model.load_state_dict` takes the
    tensors of one, so that a Trainer saves, resumes, and loads its best checkpoint as usual.

    Raises UserError for layers or experts that do not exist, where nothing would train, where processes disagree, for
    a model that ZeRO 3 has partitioned already, and for one in low precision of which more than routed experts is to
    train: those modules have no masters. (Load it in float32 and train with bf16=True, or let DeepSpeed's bf16 keep
    the masters.)
    """
    config, record = _resolved(selection)
    if moe_layers(model):
        raise UserError("the model has experts layers of ours already: apply a selection once, to a plain model")
    for name, parameter in model.named_parameters():
        check_whole(name, parameter)
    names = AdapterNames.of(model)
    names.expert_tensors(config.experts)
    allowed = {True: config.shared_experts, False: config.non_expert_modules}
    stacked = set(names.counts)
    others = {n: p for n, p in model.named_parameters() if n not in stacked and allowed[is_shared_expert(n)]}
    if not others and not any(config.experts.values()):
        raise UserError("the selection is empty: no expert would train")
    low = next((name for name, p in others.items() if p.dtype in (torch.bfloat16, torch.float16)), None)
    if low is not None:
        raise UserError(
            f"{low} would train in {others[low].dtype} without a float32 master, and small updates would be lost. "
            "Load the model with dtype=torch.float32 and train with bf16=True (or DeepSpeed's bf16), or train routed "
            "experts only: shared_experts and non_expert_modules false"
        )
    _agree(config)
    base = find_base(model)
    if base is not None:
        _ = base.fingerprint  # of the weights as they are now, not when the adapter is written
    paths = {index: description.name for index, description in names.layers().items()}
    replace_experts(model, {paths[index]: ids for index, ids in config.experts.items()})
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "is_expert", False):
            parameter.requires_grad_(name in others)
    attach(model, Applied(config, record, names, base))
    return model


def _resolved(selection: Selection) -> tuple[ExpertConfig, dict[str, Any] | None]:
    """The expert config, and how it was chosen where that is known."""
    if isinstance(selection, Choice):
        return selection.config, selection.record
    if isinstance(selection, (str, Path)):
        return read_expert_config(selection), None
    if isinstance(selection, ExpertConfig):
        return selection, None
    if not isinstance(selection, Mapping):
        raise UserError(f"selection: {type(selection).__name__} is none; expected {{layer index: [expert ids]}}")
    return ExpertConfig({str(layer): [int(expert) for expert in ids] for layer, ids in selection.items()}), None


def _agree(config: ExpertConfig) -> None:
    """Data parallel processes hold the same parameters, or they would wait for each other forever."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    ordered = [sorted((layer, sorted(ids)) for layer, ids in config.experts.items() if ids)]
    mine = hashlib.sha256(json.dumps([ordered, config.shared_experts, config.non_expert_modules]).encode()).hexdigest()
    all_of_them: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    if len(set(all_of_them)) > 1:
        odd = [rank for rank, digest in enumerate(all_of_them) if digest != all_of_them[0]]
        raise UserError(
            f"process(es) {odd} apply another selection than process 0: score on the same batches everywhere, or score "
            "once and give all processes the file"
        )
