"""Extension: a dense model becomes one more expert of a Nexus model; and an expert is taken out again.

Its MLPs are appended to the routed experts and its domain's embedding to the router, which has no other weight for it
(arXiv 2408.15901, section 2.3). Of everything that is neither MLP nor router it takes the share λ,
φ = (1 − λ) φ_moe + λ φ_new, with λ = 1/(n+1) for n experts before. A linear router needs a new row:

    reset     all rows are drawn anew: the paper's baseline
    append    one random row
    centroid  the mean of the router's inputs over the new domain, as long as the other rows are on average
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from moe_dist.errors import UserError
from moe_dist.methods.nexus.config import NexusConfig
from moe_dist.methods.nexus.domain_file import Domains, read_domains
from moe_dist.methods.nexus.folders import ModelFolder, check_can_join, mlp_part, open_dense, open_nexus
from moe_dist.methods.nexus.parts import Part, blend, mean_of, random, write_model
from moe_dist.methods.nexus.receipt import Receipt, measure_change
from moe_dist.models.shards import SHARD_BYTES, Entry

_EXPERT = re.compile(r"^(.*\.mlp\.experts\.)(\d+)(\..*)$")


@dataclass(frozen=True)
class Change:
    """A Nexus model with an expert more or less.

    kept: new id of an expert -> its old id, for those that stay. merged: tensors that took the share `share` of the
    new model. new_rows: whether the router's rows of the old experts are other ones now.
    """

    what: str
    model: ModelFolder
    others: tuple[ModelFolder, ...]
    config: PreTrainedConfig
    parts: tuple[Part, ...]
    kept: dict[int, int]
    merged: tuple[str, ...] = ()
    share: float = 0.0
    new_rows: bool = False


def extend(
    config: NexusConfig,
    out: str | Path,
    *,
    look: Callable[[Path], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Receipt:
    """Write nexus.model with the one model of nexus.experts as a further expert to the folder `out`, new or empty.

    The domain comes from nexus.domains, embedded in the space of the model's own domains (nexus.same_space_as).
    Everything is checked on headers first; UserError says what does not fit. look: is called with the written folder
    before it appears as `out`, which it does not if that raises.
    """
    return _write(_plan(config), out, shard_bytes, look)


def remove(model: str | Path, expert: str, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Receipt:
    """Write the Nexus model in the folder `model` without the expert of that name (or number) to `out`, new or empty.

    Later experts move up. What merging has mixed into the other tensors stays there.
    """
    opened = open_nexus("the model", model)
    names = expert_names(opened.config)
    if expert not in names:
        raise UserError(f"{model} has no expert {expert!r}; it has {', '.join(names)}")
    if len(names) <= opened.config.num_experts_per_tok:
        raise UserError(f"{model} sends each token to {opened.config.num_experts_per_tok} experts and has no more")
    gone = names.index(expert)
    kept = dict(enumerate(old for old in range(len(names)) if old != gone))
    parts = []
    for key, info in opened.tensors.items():
        found = _EXPERT.match(key)
        if found:
            if int(found[2]) != gone:
                new = int(found[2]) - (int(found[2]) > gone)
                parts.append(mean_of(f"{found[1]}{new}{found[3]}", key, (opened,)))
        elif _is_row_per_expert(key, opened.config):
            entry = Entry((len(kept), *info.shape[1:]), info.dtype)
            rows = partial(_rows, opened, key, tuple(kept.values()))
            parts.append(Part(key, entry, f"rows of the model, without {expert}", make=rows))
        else:
            parts.append(mean_of(key, key, (opened,)))
    stretched = [new for new, old in kept.items() if old in opened.config.renormalised]
    changed = _reconfigured(opened.config, [name for name in names if name != expert], stretched)
    return _write(Change(f"remove {expert}", opened, (), changed, tuple(parts), kept), out, shard_bytes)


def expert_names(config: PreTrainedConfig) -> list[str]:
    """Names of a model's routed experts: their numbers where nobody named them."""
    return list(config.expert_names) or [str(number) for number in range(config.num_experts)]


def merge_share(config: NexusConfig, model: PreTrainedConfig) -> float:
    """λ: nexus.merge, or 1/(n+1)."""
    return 1 / (model.num_experts + 1) if config.nexus.merge is None else config.nexus.merge


def _write(change: Change, out: str | Path, shard_bytes: int, look: Callable[[Path], None] | None = None) -> Receipt:
    looks = {"measure": partial(measure_change, change), "look": look}
    return write_model(out, change.parts, change.config, change.model.folder, shard_bytes=shard_bytes, **looks)


def _plan(config: NexusConfig) -> Change:
    nexus = config.nexus
    if nexus.model is None:
        raise UserError("nexus.model is not set: name the Nexus model that gets a new expert")
    if len(nexus.experts) != 1:
        raise UserError(f"nexus.experts: name the one new expert as {{domain: folder}}, not {len(nexus.experts)}")
    (name, folder) = next(iter(nexus.experts.items()))
    model, new = open_nexus("the model", nexus.model), open_dense(f"expert {name}", folder)
    names = expert_names(model.config)
    if name in names:
        raise UserError(f"{nexus.model} has an expert {name} already; give the new domain another name")
    check_can_join(new, model)
    if nexus.renorm_new and model.config.router != "paper":
        raise UserError(
            f"nexus.renorm_new=true: is for the paper router; {nexus.model} has a {model.config.router} one"
        )
    domain = _domain(config, model, name)
    share, count = merge_share(config, model.config), model.config.num_experts
    parts, merged = [], []
    for key, info in model.tensors.items():
        if _is_row_per_expert(key, model.config):
            parts.append(_longer(key, model, domain, config))
        elif key in new.tensors and mlp_part(key) is None:
            made = partial(_blended, model, new, key, share)
            said = f"{1 - share:.4g} of the model, {share:.4g} of {new.name}: {key}"
            parts.append(Part(key, Entry(info.shape, info.dtype), said, make=made))
            merged.append(key)
        else:
            parts.append(mean_of(key, key, (model,)))
    for key in new.tensors:
        mlp = mlp_part(key)
        if mlp is not None:
            parts.append(mean_of(f"{mlp[0]}.experts.{count}.{mlp[1]}.weight", key, (new,)))
    stretched = [*model.config.renormalised, *([count] if nexus.renorm_new else [])]
    changed = _reconfigured(model.config, [*names, name], stretched)
    kept = {number: number for number in range(count)}
    redrawn = model.config.router == "linear" and nexus.linear_extend == "reset"
    what = f"extend by {name}"
    return Change(what, model, (new,), changed, tuple(parts), kept, tuple(merged), share, redrawn)


def _is_row_per_expert(key: str, config: PreTrainedConfig) -> bool:
    return key.endswith(".mlp.gate.weight" if config.router == "linear" else ".mlp.gate.domain_embeddings")


def _domain(config: NexusConfig, model: ModelFolder, name: str) -> Domains | None:
    """The new domain's row, in the space of the model's own; None where no row needs one."""
    nexus = config.nexus
    if model.config.router == "linear" and nexus.linear_extend != "centroid":
        return None
    if nexus.domains is None:
        raise UserError(
            "nexus.domains is not set: embed the new domain with nexus.same_space_as set to the old domain file"
        )
    found = read_domains(nexus.domains)
    if name not in found.names:
        raise UserError(f"nexus.domains={nexus.domains} has no domain {name}; it has {', '.join(found.names)}")
    if model.config.router != "linear":
        found.check_same_space(model.config.domain_space, where=str(nexus.model))
    if found.prototypes_LNH is None and model.config.router != "paper":
        raise UserError(f"nexus.domains={nexus.domains} holds no statistics of the seed model, which are needed here")
    if model.config.router != "paper":
        layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
        found.check_prototypes_fit(layers=layers, hidden=hidden, where=f"nexus.domains={nexus.domains}")
    return found


def _longer(key: str, model: ModelFolder, domain: Domains | None, config: NexusConfig) -> Part:
    """The router's tensor of one row an expert, with one row more."""
    info, layer = model.tensors[key], int(key.split(".")[2])
    entry = Entry((info.shape[0] + 1, *info.shape[1:]), info.dtype)
    (name,) = config.nexus.experts
    std, seed = model.config.initializer_range, config.nexus.init_seed
    if model.config.router != "linear":
        row = domain.names.index(name)
        source = domain.directions_NM if model.config.router == "paper" else domain.prototypes_LNH[layer]
        said = f"rows of the model, then the embedding of {name}"
        return Part(key, entry, said, make=partial(_append, model, key, source[row]))
    how = config.nexus.linear_extend
    draw = f"{key} of {entry.shape[0]} experts"  # other values than those that the rows have started from
    if how == "reset":
        return Part(key, entry, f"random, std {std:g}, seed {seed}", make=random(draw, entry, std, seed))
    if how == "append":
        last = random(draw, Entry(info.shape[1:], info.dtype), std, seed)()
        return Part(key, entry, "rows of the model, then a random one", make=partial(_append, model, key, last))
    row = domain.names.index(name)
    centroid_H = domain.prototypes_LNH[layer, row] + domain.inputs.mean_LH[layer]
    said = f"rows of the model, then the mean of the router's inputs over {name}"
    return Part(key, entry, said, make=partial(_append, model, key, centroid_H, rescale=True))


def _append(model: ModelFolder, key: str, row: torch.Tensor, *, rescale: bool = False) -> torch.Tensor:
    old = model.read(key)
    if rescale:
        row = F.normalize(row, dim=0) * old.float().norm(dim=1).mean()
    return torch.cat([old, row.to(old.dtype)[None]])


def _rows(model: ModelFolder, key: str, rows: Iterable[int]) -> torch.Tensor:
    return model.read(key)[list(rows)]


def _blended(model: ModelFolder, new: ModelFolder, key: str, share: float) -> torch.Tensor:
    return blend(model.read(key), new.read(key), share)


def _reconfigured(config: PreTrainedConfig, names: list[str], renormalised: list[int]) -> PreTrainedConfig:
    values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    return type(config)(**{**values, "num_experts": len(names), "expert_names": names, "renormalised": renormalised})
