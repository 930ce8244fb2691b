"""LoRA by PEFT in a dense transformers model: W x + (alpha / rank) · B A x, with W frozen.

PEFT's own layers take the places of the linear ones, on the meta device as well. What they add is called
`<linear layer>.lora_A.default.weight` (A, `[rank, in]`) and `<linear layer>.lora_B.default.weight` (B, `[out, rank]`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_dist.config.schema import LoraSection
from moe_dist.errors import UserError
from moe_dist.moe.layer import MoEExperts

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
PARAMETERS = ("*.lora_A.*", "*.lora_B.*")  # globs of everything that LoRA adds


def inject_lora(model: PreTrainedModel, lora: LoraSection) -> None:
    """Put LoRA into `model`, in place; everything else in it is frozen.

    A is what PEFT gives a model after `torch.manual_seed(lora.seed)`, the same on every rank and device; B is zero.
    Raises UserError for a model with routed experts, for targets that are not there or no linear layers, and where PEFT
    is not installed.
    """
    if any(isinstance(module, MoEExperts) for module in model.modules()):
        raise UserError(
            "lora: this model has routed experts, which are stacked tensors and no linear layers; LoRA is for dense "
            "models. Train some of the experts themselves instead, as `moe-dist esft` does"
        )
    if getattr(model.config, "mixse", None) is not None:
        raise UserError("lora: this model has LoRA experts already; train an expert on the base model by itself")
    try:
        from peft import inject_adapter_in_model
    except ImportError:
        raise UserError("lora: PEFT is not installed; pip install 'moe_dist[lora]'") from None
    _check_targets(model, lora.targets)
    on_meta = next(model.parameters()).is_meta
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(lora.seed)
            inject_adapter_in_model(_peft_config(lora), model, low_cpu_mem_usage=on_meta)
    except ValueError as error:
        raise UserError(f"lora: PEFT refuses: {error}") from None


def injected_config(model: PreTrainedModel) -> LoraConfig:
    """PEFT's configuration of the LoRA that `inject_lora` has put into `model`, its targets those that were found."""
    return model.peft_config["default"]


def _peft_config(lora: LoraSection) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # PEFT's own configs have integers
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.targets == [ALL_LINEAR] else list(lora.targets),
        task_type="CAUSAL_LM",
    )


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    if list(targets) == [ALL_LINEAR]:
        return
    modules = dict(model.named_modules())
    linear = {name.rpartition(".")[2] for name, part in modules.items() if isinstance(part, nn.Linear)}
    known = ", ".join(sorted(linear))
    for target in targets:
        # As PEFT matches them.
        meant = [part for name, part in modules.items() if name == target or name.endswith(f".{target}")]
        if not meant:
            raise UserError(f"lora.targets: nothing in this model is called {target}; its linear layers are {known}")
        if not all(isinstance(part, nn.Linear) for part in meant):
            raise UserError(f"lora.targets: {target} is no linear layer; those of this model are {known}")
        head = model.get_output_embeddings()
        if head in meant and head.weight is model.get_input_embeddings().weight:
            raise UserError(f"lora.targets: {target} shares its weight with the embedding in this model; leave it out")
