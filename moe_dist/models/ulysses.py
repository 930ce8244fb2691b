"""Attention over the sequence axis: each rank has all tokens of some heads while it attends (Ulysses).

A transformers attention module projects the tokens that its rank has, turns them by their positions, and calls the
attention function that its config names. Here that name is one of ours: a function that exchanges tokens of all heads
for all tokens of this rank's heads, calls the function that the config named before, and exchanges back. What a head
computes is what it computes in one process; masks are made of whole rows (`train/rows.py`), so packed documents,
sliding windows and chunks hold across the cut.

DeepSpeed's `UlyssesSPAttentionHF` works in the same place, but drops every ready mask, and with it packed documents
under sdpa; refuses eager attention; needs heads of one size, where latent attention has two; gives each rank all
attention sinks; and gathers position ids anew in each layer. Its exchange passes by the counters of
`parallel/traffic.py`.

With fewer key and value heads than ranks, or a number that the ranks do not divide, each is sent to all ranks whose
query heads need it. Only attention modules see the other name: the model's own config, which is saved, stays as it is.
Recomputation runs the exchanges of the forward again: they are inside of what it repeats.
"""

from __future__ import annotations

import inspect
import math

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_dist.errors import UserError
from moe_dist.models.nexus.configuration_nexus import CONFIGS as DENSE_TYPES
from moe_dist.models.nexus.configuration_nexus import MODEL_TYPES as NEXUS_TYPES
from moe_dist.parallel.grid import Grid
from moe_dist.parallel.sequence import heads_of_tokens, tokens_of_heads

NAME = "heads_over_ranks"
FUNCTIONS = ("eager", "sdpa")  # attention functions that work on ready masks
# Families whose layers were seen to compute over the sequence axis what they do in one process. Others may look at
# their neighbours outside of the attention function: convolutions, recurrences, indexers, temperatures by position.
TRIED = (
    *("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
    *DENSE_TYPES,
    *NEXUS_TYPES,
)
_GROWING = ("dynamic", "longrope")  # rotary embeddings that look for the largest position of what they are given


def spread_attention(model: PreTrainedModel, grid: Grid) -> None:
    """Make the attention of `model` exchange heads for tokens over `grid.sequence_group`; nothing at size 1. In place.

    model: on any device, after the tensor axis has cut it. It is then called with a rank's block of rows and masks of
    whole rows (`train/rows.py`). Without the group, on a grid of numbers alone, it is only checked and prepared.
    Raises UserError where the number of heads or the family does not allow it.
    """
    if grid.sequence == 1:
        return
    _check(model, grid)
    for module in model.modules():
        if _calls_attention(module):
            module.config = OverRanks(module.config, grid.sequence_group)


class OverRanks:
    """The config of an attention module whose heads are dealt over a sequence group; all else is the model's own."""

    _attn_implementation = NAME

    def __init__(self, config: PreTrainedConfig, group: dist.ProcessGroup | None):
        self.config, self.group = config, group

    def __getattr__(self, name: str):
        return getattr(self.__dict__["config"], name)


class _OnHeads:
    """An attention module as its attention function is to see it, which finds what is sized by heads there."""

    def __init__(self, module: nn.Module, **changed):
        self.__dict__.update(changed, module=module)

    def __getattr__(self, name: str):
        return getattr(self.__dict__["module"], name)


def _attend(module: nn.Module, q_BhMD, k_BgMD, v_BgMD, attention_mask, **options):
    """In the place of an attention function of transformers: `[B,heads,M,D]` in, `[B,M,heads,D]` and no weights out."""
    config, group = module.config.config, module.config.group
    assert group is not None, "attention was prepared on a grid without process groups"
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    # Each key head serves a run of query heads. Repeated just so often that the ranks divide their number, every rank
    # gets those of its query heads: h/s query heads lie within (repeated) k/s key heads, as s divides both.
    times = size // math.gcd(k_BgMD.shape[1], size)
    if times > 1:
        k_BgMD, v_BgMD = (x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2) for x in (k_BgMD, v_BgMD))
    q_BhLD, k_BgLD, v_BgLD = tokens_of_heads((q_BhMD, k_BgMD, v_BgMD), group)
    length = q_BhLD.shape[2]
    ready = attention_mask is None or attention_mask.shape[-2:] == (length, length)
    assert ready, f"a mask of {tuple(attention_mask.shape)} for rows of {length} tokens"

    heads = q_BhLD.shape[1]
    here = {"num_key_value_groups": heads // k_BgLD.shape[1]}
    if (sinks_h := getattr(module, "sinks", None)) is not None:
        here["sinks"] = options["s_aux"] = sinks_h[rank * heads : (rank + 1) * heads]
    made_by = inspect.unwrap(type(module).forward).__globals__
    attention = made_by["ALL_ATTENTION_FUNCTIONS"].get_interface(_function(config), made_by["eager_attention_forward"])
    out_BLhD, _ = attention(_OnHeads(module, **here), q_BhLD, k_BgLD, v_BgLD, attention_mask, **options)
    return heads_of_tokens(out_BLhD, group), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)


def _function(config: PreTrainedConfig) -> str:
    name = config._attn_implementation
    if name not in FUNCTIONS:
        raise UserError(
            f"model.attention={name}: not available over the sequence axis; choose {' or '.join(FUNCTIONS)}, or set "
            "parallel.sequence=1"
        )
    return name


def _calls_attention(module: nn.Module) -> bool:
    """Whether a module of transformers calls the attention function that its config names."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


def _check(model: PreTrainedModel, grid: Grid) -> None:
    config, asked = model.config.get_text_config(), f"parallel.sequence={grid.sequence}"
    if model.config.model_type not in TRIED:
        raise UserError(
            f"{asked}: {model.config.model_type} has not been tried over the sequence axis, only "
            f"{', '.join(TRIED)}; set it to 1"
        )
    if getattr(model.config, "mixse", None) is not None:
        raise UserError(f"{asked}: a mixture of LoRA experts keeps the base model's states of whole rows; set it to 1")
    heads, rest = divmod(config.num_attention_heads, grid.tensor)
    assert rest == 0, "the tensor axis has checked that it divides the heads"
    if heads % grid.sequence:
        works = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        of_rank = f" on each of {grid.tensor} tensor ranks" if grid.tensor > 1 else ""
        raise UserError(
            f"{asked} does not divide the {heads} attention heads{of_rank} of this model; what works here: {works}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if growing := [kind["rope_type"] for kind in kinds if kind.get("rope_type") in _GROWING]:
        raise UserError(
            f"{asked}: rotary embeddings of type {growing[0]} depend on the longest row, of which a rank sees a part; "
            "set it to 1"
        )
    _function(config)
