"""Our experts layers in a transformers model that holds its weights already."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_dist.errors import UserError
from moe_dist.models.families import ExpertsDescription, find_experts
from moe_dist.models.surgery import moe_layers, swap
from moe_dist.moe.experts import ExpertSpan
from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import Grid


def replace_experts(model: PreTrainedModel, trainable: Mapping[str, Iterable[int]]) -> None:
    """Put our layers in place of the model's experts, with their weights; these ids by layer path train, in float32.

    One layer at a time: what it costs for a moment is the memory of a layer.
    """
    stock = dict(find_experts(model))
    swap(model, Grid.single(), trainable={path: list(ids) for path, ids in trainable.items()}, device="meta")
    for path, layer in moe_layers(model):
        source = stock.pop(path)
        layer.train(source.training)
        for span in layer.spans():
            _fill(span, layer.origin, source, trains=span is layer.trainable)
        block = model.get_submodule(path.rpartition(".")[0])
        layer.register_forward_pre_hook(partial(_known_to_zero_3, block))


def _fill(span: ExpertSpan, description: ExpertsDescription, source: nn.Module, *, trains: bool) -> None:
    for name, _ in list(span.named_parameters()):
        stacked = getattr(source, description.stock_names[name]).data
        value = _rows(stacked, span.seat_ids)
        if description.transposed and value.dim() == 3:
            value = value.transpose(1, 2).contiguous()
        parameter = nn.Parameter(value.float() if trains else value, requires_grad=trains)
        parameter.is_expert = True
        span.register_parameter(name, parameter)


def _rows(stacked: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """These rows of a stack; the stack itself, not a copy, where they are all of it in order."""
    return stacked if list(ids) == list(range(len(stacked))) else stacked[list(ids)]


def _known_to_zero_3(block: nn.Module, layer: MoEExperts, _: tuple) -> None:
    """ZeRO 3 gathers a module's own parameters before its forward. Ours lie in the spans, whose forward is never
    called, so the layer has to name them. Only an engine knows that it partitions, hence at the first forward."""
    for _, parameter, _ in layer.expert_parameters():
        if hasattr(parameter, "ds_id") and id(parameter) not in getattr(layer, "_external_params", {}):
            deepspeed = sys.modules["deepspeed"]
            if deepspeed.utils.z3_leaf_module(block):
                raise UserError(
                    f"DeepSpeed takes each {type(block).__name__} as one unit and would free weights that its backward "
                    'needs, where the input of the lowest one has no gradient. Set "zero_optimization": '
                    '{"leaf_module": {"classes": []}, ...} in the DeepSpeed configuration'
                )
            deepspeed.zero.register_external_parameter(layer, parameter)
