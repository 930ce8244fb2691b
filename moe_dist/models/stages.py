"""Pipeline stages: which layers a stage has, and a model that holds those alone.

A stage keeps the family's own model, with pass-through modules in the places of what other stages hold. So every module
and parameter keeps its name, and forward code that counts layers or looks at their kinds by position stays right. The
first stage alone embeds; the others are called with `inputs_embeds`, the hidden states that the stage before them gave.
The last stage alone has the final norm and the head; what the others give as logits are their hidden states.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_dist.errors import UserError
from moe_dist.models.nexus.configuration_nexus import MODEL_TYPES as NEXUS_TYPES
from moe_dist.moe.experts import ExpertSpan
from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import Grid

# Families whose stages, one after the other, were seen to compute what the whole model does. Others may do more in
# their forward than embed, run the layers and norm: Gemma scales embeddings, which would then happen at every stage.
TRIED = (
    *("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
    *("llama", "mistral", "olmo2", "qwen2", "qwen3"),
    *(name for name in NEXUS_TYPES if "gemma" not in name),
)


class PassThrough(nn.Module):
    """Stands where another stage has a layer, a norm, an embedding or a head."""

    def forward(self, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return hidden


def keep_stage(model: PreTrainedModel, grid: Grid) -> None:
    """Take out of `model` what other stages hold than `grid.pipeline_rank`; nothing with one stage. In place.

    model: whole, with our experts layers, on any device. Where it ties its head to its embedding, both ends keep the
    tensor, and the last stage's model says so: `model.tied_copies` is {its name there: its name in the whole model}.
    Raises UserError where the model has fewer layers than there are stages, and for what was not tried in stages.
    """
    if grid.pipeline == 1:
        return
    _check(model, grid.pipeline)
    decoder, tied = model.base_model, dict(model.all_tied_weights_keys)
    mine = stage_layers(model, grid.pipeline)[grid.pipeline_rank]
    for index in range(len(decoder.layers)):
        if index not in mine:
            decoder.layers[index] = PassThrough()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in (embedding,) * (not grid.is_first_stage) + (decoder.norm, head) * (not grid.is_last_stage):
        model.set_submodule(next(name for name, found in model.named_modules() if found is module), PassThrough())
    model.all_tied_weights_keys = {}
    model.tied_copies = tied if grid.is_last_stage else {}


def stage_layers(model: PreTrainedModel, stages: int) -> list[range]:
    """The decoder layers of each stage: consecutive, at least one each, so that the slowest stage is as fast as can be,
    and among such cuts the one whose stages are most even.

    What counts is the time of a token, see `layer_cost`, with the embedding at one end and the head at the other. It is
    read off shapes: every rank finds the same cut, whatever experts it has.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    costs = [layer_cost(layer, _experts_of_a_token(model)) for layer in model.base_model.layers]
    costs[0] += embedding.embedding_dim  # a lookup: a row read, and a row added to in the backward
    costs[-1] += head.weight.numel()
    # worst[s][n]: the slowest of s stages that share the first n layers, at best.
    count = len(costs)
    total = [sum(costs[:end]) for end in range(count + 1)]
    worst = [[0.0] + [float("inf")] * count]
    for _ in range(stages):
        before = worst[-1]
        worst.append(
            [
                min((max(before[cut], total[end] - total[cut]) for cut in range(end)), default=float("inf"))
                for end in range(count + 1)
            ]
        )
    limit = worst[stages][count]
    # even[n]: (sum of squares, cuts) of the most even stages so far, none of them above the limit.
    even: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ())] + [None] * count
    for _ in range(stages):
        even = [
            min(
                (
                    (even[cut][0] + (total[end] - total[cut]) ** 2, (*even[cut][1], cut))
                    for cut in range(end)
                    if even[cut] is not None and total[end] - total[cut] <= limit
                ),
                default=None,
            )
            for end in range(count + 1)
        ]
    starts = even[count][1]
    return [range(start, end) for start, end in zip(starts, (*starts[1:], count), strict=True)]


def layer_cost(layer: nn.Module, experts_of_a_token: int) -> int:
    """Multiplications of a token in a layer: the elements of its matrices, K of E experts counted. What attention does
    between tokens depends on their number and is nearly the same in all layers: it is left out."""
    cost = 0
    for module in layer.modules():
        if isinstance(module, MoEExperts):
            shapes = module.spec.shapes().values()
            cost += experts_of_a_token * sum(torch.Size(shape).numel() for shape in shapes if len(shape) > 1)
        elif not isinstance(module, ExpertSpan):  # this rank's seats, which other ranks may have more or fewer of
            cost += sum(matrix.numel() for matrix in module.parameters(recurse=False) if matrix.dim() > 1)
    return cost


def _experts_of_a_token(model: PreTrainedModel) -> int:
    return getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1


def _check(model: PreTrainedModel, stages: int) -> None:
    if getattr(model, "peft_config", None) is not None or getattr(model.config, "mixse", None) is not None:
        raise UserError(f"parallel.pipeline={stages}: LoRA, alone or mixed, runs in one stage; set it to 1")
    if model.config.model_type not in TRIED or model.get_output_embeddings() is None:
        raise UserError(
            f"parallel.pipeline={stages}: {type(model).__name__} was not tried in stages; its forward may do more than "
            f"embed, run layer after layer and norm. Tried are the causal language models of {', '.join(TRIED)}; set "
            "parallel.pipeline=1 for others"
        )
    layers = len(model.base_model.layers)
    if stages > layers:
        raise UserError(
            f"parallel.pipeline={stages}: the model has {layers} layers, and a stage needs at least one; set it to at "
            f"most {layers}"
        )
