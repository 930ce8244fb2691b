"""Tensor parallelism: attention and dense MLP blocks cut over the tensor group, by the family's own plan.

A *block* is a module with column-parallel linear layers and one row-parallel one: attention (its heads are dealt out)
or a dense MLP (its columns are). It gets the tokens of all ranks of the group at its entrance and gives back the sum of
what they computed at its exit, each rank its own slice (`parallel/tensor.py`); both by hooks, so modules and parameters
keep their names, and recomputation, which wraps `forward` inside of the hooks, repeats no exchange. The embedding is
cut by rows of the vocabulary, and so is the output layer, which gives the logits of this rank's part of it.

All the rest stays whole and works on the tokens of this rank's slice: norms, routers, experts, shared experts. What
stays whole inside a block, such as the norms of heads or the compression of latent attention, sees all tokens on every
rank, but what flows back to it comes through this rank's heads alone: the sum over ranks is its gradient, too.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_dist.errors import UserError
from moe_dist.parallel.grid import Grid
from moe_dist.parallel.shard import Shard, cut_parameter
from moe_dist.parallel.tensor import gather_tokens, own_ids, scatter_sum

COLUMN, ROW = "colwise", "rowwise"
# Styles of what stays whole inside a block, and of a block that uses its parameters itself.
WHOLE = ("replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params")
# Families whose plan in transformers leaves attention out. DeepSeek-V3's layers are called as DeepSeek-V2's; gpt-oss
# has one logit a head beside them.
COMPLETED = {
    "deepseek_v3": {"q_proj": COLUMN, "q_b_proj": COLUMN, "kv_b_proj": COLUMN, "o_proj": ROW},
    "gpt_oss": {"q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "o_proj": ROW, "sinks": COLUMN},
}
# Whatever is called with one of these mixes tokens.
_MIXERS = {"attention_mask", "position_embeddings", "past_key_values", "past_key_value", "cache_params"}


@dataclass(frozen=True)
class Block:
    """A module that is cut: the names in it of the column-parallel linear layers (or of a parameter that has an element
    a head, cut alike), and of the row-parallel layer."""

    module: nn.Module
    columns: tuple[str, ...]
    row: str

    @property
    def is_attention(self) -> bool:
        return bool(_MIXERS & set(_arguments(self.module)))


def check_tensors(model: PreTrainedModel, grid: Grid) -> None:
    """Raise UserError for a model that the tensor axis cannot cut, or not into as many parts, saying what would work.

    model: whole, so that every pipeline stage refuses what any of them would.
    """
    if grid.tensor == 1:
        return
    if getattr(model, "peft_config", None) is not None or getattr(model.config, "mixse", None) is not None:
        raise _refused(grid, "LoRA, alone or mixed, is added to whole linear layers")
    blocks = find_blocks(model, grid)
    for path, module in _mixers(model):
        if not any(path == block or path.startswith(f"{block}.") for block in blocks):
            raise _refused(grid, f"its plan in transformers does not cut {path} ({type(module).__name__})")
    embedding = model.get_input_embeddings()
    if type(embedding).forward is not nn.Embedding.forward:
        raise _refused(grid, f"its embedding ({type(embedding).__name__}) does more than a lookup")
    _check_sizes(model, grid, blocks)


def cut_tensors(model: PreTrainedModel, grid: Grid) -> None:
    """Keep this rank's part of every tensor that the tensor axis cuts, and hook the exchanges onto their modules.

    In place, on any device, the meta device included; nothing at size 1. Cut parameters carry their `shard`. The model
    has passed `check_tensors`, and may be a pipeline stage of what has.
    """
    if grid.tensor == 1:
        return
    made: dict[int, nn.Parameter] = {}
    for block in find_blocks(model, grid).values():
        for name in block.columns:
            if isinstance(getattr(block.module, name), nn.Parameter):
                _cut(block.module, {name: 0}, grid, made)
            else:
                _cut(block.module.get_submodule(name), {"weight": 0, "bias": 0}, grid, made)
        row = block.module.get_submodule(block.row)
        _cut(row, {"weight": 1}, grid, made)
        if row.bias is not None:
            row.forward = functools.partial(_add_bias_once, row, grid)
        block.module.register_forward_pre_hook(functools.partial(_enter, grid), with_kwargs=True)
        block.module.register_forward_hook(functools.partial(_leave, grid))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, nn.Embedding):
        _cut(embedding, {"weight": 0}, grid, made)
        embedding.forward = functools.partial(_look_up, embedding, grid)
        embedding.register_forward_hook(functools.partial(_leave, grid))
    if isinstance(head, nn.Linear):
        _cut(head, {"weight": 0, "bias": 0}, grid, made)
        head.register_forward_pre_hook(functools.partial(_enter, grid), with_kwargs=True)


def tensor_plan(model: PreTrainedModel) -> dict[str, str]:
    """Path of a module, with `*` for numbers -> its style, as the family's classes in transformers say it."""
    base = getattr(model, model.base_model_prefix, model)
    prefix = "" if base is model else f"{model.base_model_prefix}."
    plan = dict(base.config.base_model_tp_plan or {})
    plan |= {f"layers.*.self_attn.{name}": style for name, style in COMPLETED.get(model.config.model_type, {}).items()}
    return {f"{prefix}{name}": style for name, style in plan.items()} | dict(type(model)._tp_plan or {})


def find_blocks(model: PreTrainedModel, grid: Grid) -> dict[str, Block]:
    """Path -> block, for all blocks of `model`. Shared experts are not among them: every rank holds them whole.

    Raises UserError where the family's plan asks for what is not served here.
    """
    plan, head = tensor_plan(model), model.get_output_embeddings()
    parts: dict[str, dict[str, list[str]]] = {}
    for path, module in (*model.named_modules(), *model.named_parameters()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        parent, _, name = path.rpartition(".")
        if style is None or style in WHOLE or _is_of_experts(path) or module is head:
            continue
        is_served = style in (COLUMN, ROW) if isinstance(module, nn.Linear) else style == COLUMN and _is_row(module)
        if not is_served:
            raise _refused(grid, f"its plan in transformers cuts {path} in a way that is not served here: {style}")
        parts.setdefault(parent, {COLUMN: [], ROW: []})[style].append(name)
    blocks = {}
    for path, found in parts.items():
        if not found[COLUMN] or len(found[ROW]) != 1:
            raise _refused(grid, f"its plan in transformers cuts {path} without one row-parallel layer at its end")
        blocks[path] = Block(model.get_submodule(path), tuple(found[COLUMN]), found[ROW][0])
    return blocks


def _is_row(part: nn.Module | nn.Parameter) -> bool:
    return isinstance(part, nn.Parameter) and part.dim() == 1


def _is_of_experts(path: str) -> bool:
    """Whether a module belongs to experts: ours, or those that stand beside them in an MoE block for every token."""
    return "experts" in path.split(".") or re.search(r"(^|\.)shared_\w+\.", path) is not None


def _mixers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what mixes tokens in the decoder layers: whatever is called with masks, places or a cache. A
    layer itself is called with them, too, and is meant where nothing in it is."""
    for path, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        for index, layer in enumerate(layers):
            mixing = {name: part for name, part in layer.named_modules() if _MIXERS & set(_arguments(part))}
            if len(mixing) > 1:
                mixing.pop("", None)
            for name, module in mixing.items():
                yield f"{path}.{index}.{name}".rstrip("."), module


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)


def _check_sizes(model: PreTrainedModel, grid: Grid, blocks: Mapping[str, Block]) -> None:
    """Raise UserError unless all that is dealt out can be dealt out evenly, saying into how many parts it can."""
    config = model.config.get_text_config()
    sizes: dict[str, int] = {}
    if any(block.is_attention for block in blocks.values()):
        sizes["attention heads"] = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None)
        if keys is not None and any("k_proj" in block.columns for block in blocks.values()):
            sizes["key and value heads"] = keys
    for path, block in blocks.items():
        if not block.is_attention:
            sizes[f"columns of {path}"] = block.module.get_submodule(block.row).in_features
    sizes["tokens of the vocabulary"] = model.get_input_embeddings().num_embeddings
    if wrong := {what: size for what, size in sizes.items() if size % grid.tensor}:
        what, size = next(iter(wrong.items()))
        most = math.gcd(*sizes.values())
        works = ", ".join(str(size) for size in range(1, most + 1) if most % size == 0)
        raise UserError(
            f"parallel.tensor={grid.tensor}: this model has {size} {what}, which are not dealt out evenly to "
            f"{grid.tensor} ranks. What works for it: {works}"
        )


def _refused(grid: Grid, why: str) -> UserError:
    return UserError(
        f"parallel.tensor={grid.tensor} is not available for this model: {why}. Set parallel.tensor=1; "
        "parallel.expert, parallel.sequence and parallel.zero_stage spread it over ranks as well"
    )


def _cut(module: nn.Module, dims: Mapping[str, int], grid: Grid, made: dict[int, nn.Parameter]) -> None:
    """Put this rank's part in the place of each named parameter; of a tied one the same part in all places."""
    for name, dim in dims.items():
        whole = getattr(module, name, None)
        if whole is None:
            continue
        if id(whole) not in made:
            made[id(whole)] = cut_parameter(whole, Shard(dim, grid.tensor_rank, grid.tensor))
            made[id(made[id(whole)])] = made[id(whole)]
        setattr(module, name, made[id(whole)])


def _enter(grid: Grid, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The tokens of the whole group, in place of this rank's."""
    if "hidden_states" in kwargs:
        return args, kwargs | {"hidden_states": gather_tokens(kwargs["hidden_states"], grid)}
    return (gather_tokens(args[0], grid), *args[1:]), kwargs


def _leave(grid: Grid, module: nn.Module, args: tuple, output):
    """This rank's tokens, with what all ranks of the group have computed of them."""
    if isinstance(output, tuple):
        return (scatter_sum(output[0], grid), *output[1:])
    return scatter_sum(output, grid)


def _look_up(module: nn.Embedding, grid: Grid, ids_BM: torch.Tensor) -> torch.Tensor:
    """The rows of this rank's part of the vocabulary, and zeros for the ids of the other parts: `[B,M,H]`."""
    part, size = grid.tensor_rank, module.weight.shape[0]
    places_BM, elsewhere_BM = own_ids(ids_BM, part, size, grid.tensor)
    padding = None if module.padding_idx is None else module.padding_idx - part * size
    here = padding is not None and 0 <= padding < size
    rows_BMH = F.embedding(places_BM, module.weight, padding if here else None)
    return rows_BMH.masked_fill(elsewhere_BM.unsqueeze(-1), 0.0)


def _add_bias_once(module: nn.Linear, grid: Grid, x: torch.Tensor) -> torch.Tensor:
    """A row-parallel layer's partial sum; the bias is in that of the first rank alone. The others multiply it by zero,
    so that it has a gradient on every rank, for ZeRO counts on one, and the sum of these is the gradient."""
    return F.linear(x, module.weight, module.bias * float(grid.tensor_rank == 0))
