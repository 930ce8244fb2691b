"""Families: what differs between the MoE models of transformers, and how to describe one.

Every MoE model of transformers whose experts module went through `use_experts_implementation` is served by the
general path: the module says itself whether it is gated, transposed, has biases, and how it gates; its names on disk
come from transformers' conversion mapping (`conversion.py`). `FAMILIES` adds what no module says: where the router is
and how it scores. **To add a family**: write one line there, and a tiny configuration in `tests/models`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from moe_dist.errors import UserError
from moe_dist.models.nexus.configuration_nexus import MODEL_TYPES as NEXUS_TYPES
from moe_dist.moe.experts import ExpertSpec, swiglu


@dataclass(frozen=True)
class Family:
    """What a family's router looks like.

    router: its path seen from the module that holds router and experts.
    score: "softmax" or "sigmoid", what turns all logits into scores; None where nobody described the family.
    correction_bias: a buffer of the router added to the scores for the choice of experts only.
    outputs: what the router's forward returns, in order; logits `[T,E]`, weights `[T,K]`, ids `[T,K]`.
    """

    router: str = "gate"
    score: str | None = "softmax"
    correction_bias: str | None = None
    outputs: tuple[str, ...] = ("logits", "weights", "ids")


FAMILIES: dict[str, Family] = {
    "mixtral": Family(),
    "qwen2_moe": Family(),
    "qwen3_moe": Family(),
    "olmoe": Family(),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(score="sigmoid", correction_bias="e_score_correction_bias"),
    # The weights are a softmax over the chosen logits only; the balance loss takes it over all of them.
    "gpt_oss": Family(router="router"),
    **dict.fromkeys(NEXUS_TYPES, Family()),
}


POST_NORM = "post_expert_norm"  # what transformers calls the normalisation of an expert's output row


@dataclass(frozen=True)
class ExpertsDescription:
    """One experts module of a stock transformers model.

    name: its path in the model. transposed: whether the model keeps `[E,H,F]` and `[E,I,H]` where our layer keeps
    `[S,F,H]` and `[S,H,I]`. stock_names: our parameter name -> the module's own. post_norm: the module that
    normalises each expert's output row, where there is one.
    router: path of the router in the model and its `Family`, None where none was found.
    """

    name: str
    spec: ExpertSpec
    transposed: bool
    stock_names: dict[str, str]
    post_norm: nn.Module | None = None
    router: tuple[str, Family] | None = None

    def stock_name(self, parameter: str) -> str:
        """Full name in the stock model of the stacked tensor that holds our `parameter` of all experts."""
        return f"{self.name}.{self.stock_names[parameter]}"

    def stock_shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of one expert's share of `parameter` in the stock model."""
        shape = self.spec.shapes()[parameter]
        return shape[::-1] if self.transposed else shape

    def turn(self, expert_tensor: torch.Tensor) -> torch.Tensor:
        """One expert's tensor from the model's layout into ours, or back: a transposition is its own inverse."""
        return expert_tensor.T if self.transposed and expert_tensor.dim() == 2 else expert_tensor


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module of `model` that follows transformers' experts interface."""
    for name, module in model.named_modules():
        if all(hasattr(module, mark) for mark in ("has_gate", "has_bias", "is_transposed", "num_experts")):
            yield name, module


def describe_experts(model: nn.Module) -> list[ExpertsDescription]:
    """Describe all experts modules of a stock transformers model, which may be on the meta device."""
    family = FAMILIES.get(model.config.get_text_config().model_type)
    return [_describe(model, name, module, family) for name, module in find_experts(model)]


def expert_counts(descriptions: list[ExpertsDescription]) -> dict[str, int]:
    """Name of each stacked expert tensor of the stock model -> how many experts it stacks."""
    return {d.stock_name(parameter): d.spec.num_experts for d in descriptions for parameter in d.spec.shapes()}


def our_name(stock_name: str, descriptions: list[ExpertsDescription]) -> str:
    """Name in a model with our layers of a stock tensor that is not stacked over experts."""
    for description in descriptions:
        stock_name = stock_name.replace(f"{description.name}.{POST_NORM}.", f"{description.name}.post_norm.")
    return stock_name


def stock_names_of(module: nn.Module) -> dict[str, str]:
    """Our parameter name -> the name of the same tensor in a module that follows the experts interface."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = {"gate_up_proj": up, "down_proj": "down_proj"}
    if module.has_bias:
        names |= {"gate_up_proj_bias": f"{up}_bias", "down_proj_bias": "down_proj_bias"}
    return names


def _describe(model: nn.Module, name: str, module: nn.Module, family: Family | None) -> ExpertsDescription:
    stock_names = stock_names_of(module)
    post_norm = getattr(module, POST_NORM) if getattr(module, "has_post_expert_norm", False) else None
    known = {*stock_names.values(), POST_NORM}
    strange = [key for key, _ in module.named_parameters() if key.partition(".")[0] not in known]
    if strange:
        raise UserError(
            f"{name} ({type(module).__name__}) has parameters that the experts layer does not know: "
            f"{', '.join(strange)}. {HOW_TO_ADD}"
        )
    down = module.down_proj.shape
    hidden, width = (down[2], down[1]) if module.is_transposed else (down[1], down[2])
    spec = ExpertSpec(
        num_experts=module.num_experts,
        hidden=hidden,
        width=width,
        activation=activation_of(module),
        gated=module.has_gate,
        bias=module.has_bias,
    )
    description = ExpertsDescription(
        name, spec, module.is_transposed, stock_names, post_norm, _find_router(model, name, family)
    )
    for parameter, stock in stock_names.items():
        expected = (spec.num_experts, *description.stock_shape(parameter))
        actual = tuple(getattr(module, stock).shape)
        assert actual == expected, f"{name}.{stock} is {actual}, its class promises {expected}"
    return description


def activation_of(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """z `[R,F]` -> a `[R,I]` as a module with the experts interface computes it; `swiglu` where that is what it is.

    Raises UserError where the activation has parameters of its own.
    """
    default = type(module)._apply_gate is _default_apply_gate
    if module.has_gate and default and _is_silu(module.act_fn):
        return swiglu
    # The gate is a method and may read limits and slopes from its module: bind it to a copy without the weights.
    shell = object.__new__(type(module))
    submodules = {key: child for key, child in module._modules.items() if key != POST_NORM}
    shell.__dict__ = {**module.__dict__, "_parameters": {}, "_modules": submodules}
    learnt = [key for key, _ in shell.named_parameters()]
    if learnt:
        raise UserError(f"{type(module).__name__}: learnt activations ({', '.join(learnt)}) are not supported")
    return shell._apply_gate if module.has_gate else module.act_fn


def _is_silu(act_fn: Callable) -> bool:
    return act_fn is torch.nn.functional.silu or type(act_fn) in (nn.SiLU, type(ACT2FN["silu"]))


def _find_router(model: nn.Module, name: str, family: Family | None) -> tuple[str, Family] | None:
    parent, _, _ = name.rpartition(".")
    holder = model.get_submodule(parent)
    candidates = [family] if family else [Family(path, score=None) for path in ("gate", "router")]
    for candidate in candidates:
        if isinstance(getattr(holder, candidate.router, None), nn.Module):
            return f"{parent}.{candidate.router}" if parent else candidate.router, candidate
    return None


HOW_TO_ADD = (
    "To add a family: its experts must be a module decorated with transformers' `use_experts_implementation`, called "
    "as experts(hidden, ids, weights); then add a line to FAMILIES in moe_dist/models/families.py that says where its "
    "router is, and a tiny configuration to tests/models"
)


@cache
def interface_models() -> tuple[str, ...]:
    """The model folders of the installed transformers whose code has a module with the experts interface."""
    root = Path(transformers.__file__).parent / "models"
    decorated = re.compile(r"^@use_experts_implementation\b", re.MULTILINE)
    files = sorted(root.glob("*/modeling_*.py"))
    return tuple(sorted({f.parent.name for f in files if decorated.search(f.read_text(encoding="utf-8"))}))


def unknown_family(model_type: str | None) -> UserError:
    """The error for a model that has no experts we could replace."""
    others = [name for name in interface_models() if name not in FAMILIES]
    return UserError(
        f"model type {model_type!r} is not a known MoE family. Known: {', '.join(FAMILIES)}; through the general path "
        f"also {', '.join(others)}. {HOW_TO_ADD}"
    )
