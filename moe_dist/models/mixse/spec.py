"""What a MiXSE model is beside its base: the key `mixse` of `config.json`, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from transformers import PreTrainedConfig

from moe_dist.errors import UserError

KEY = "mixse"  # in config.json, and the folder beside the weights
ROUTER_INPUTS = ("block_input", "base_last_hidden")
ROUTINGS = ("learned", "uniform", "random")


@dataclass(frozen=True, kw_only=True)
class MixseSpec:
    """The mixture over a base model.

    experts: their names, in the order of the router's rows. ranks, scales: of each expert's LoRA; scale is alpha / r.
    targets: last names of the linear layers inside decoder blocks that have experts, such as "q_proj".
    router_input: "block_input", the hidden state that enters each decoder block, or "base_last_hidden", the last hidden
    state of the base model without experts, one mixture for all blocks (as X-LoRA has it; two passes).
    top_k: experts of a token. bias: whether the router has one.
    routing: "learned"; or "uniform" and "random", which leave the router unused and exist to be compared with: all
    experts at 1/n, and `top_k` experts at 1/top_k, drawn by token, position, block and `seed`.
    """

    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    targets: tuple[str, ...]
    router_input: str = "block_input"
    top_k: int = 1
    bias: bool = False
    routing: str = "learned"
    seed: int = 0

    def slices(self) -> dict[str, slice]:
        """Name of each expert -> its rows of `experts_a` and `experts_b`."""
        found, start = {}, 0
        for name, rank in zip(self.experts, self.ranks, strict=True):
            found[name] = slice(start, start + rank)
            start += rank
        return found

    def to_dict(self) -> dict:
        """As it stands in config.json."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def check(self, where: str) -> MixseSpec:
        """Itself; UserError naming `where` for values that no mixture has."""
        count = len(self.experts)
        if not count:
            raise UserError(f"{where}: no experts; a mixture needs at least one")
        for name in self.experts:
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w.\-]*", name):
                raise UserError(f"{where}: {name!r} is no name of an expert: letters, digits, '_', '-' and '.'")
        if len(set(self.experts)) < count:
            raise UserError(f"{where}: experts {list(self.experts)}: a name occurs twice")
        for key, given in (("ranks", self.ranks), ("scales", self.scales)):
            if len(given) != count:
                raise UserError(f"{where}: {len(given)} {key} for {count} experts")
        if not all(type(rank) is int and rank > 0 for rank in self.ranks):
            raise UserError(f"{where}: ranks {list(self.ranks)}: expected positive integers")
        if not all(type(scale) in (int, float) and abs(scale) < float("inf") for scale in self.scales):
            raise UserError(f"{where}: scales {list(self.scales)}: expected numbers")
        if not self.targets or not all(isinstance(target, str) for target in self.targets):
            raise UserError(f"{where}: targets {list(self.targets)}: expected names of linear layers, such as q_proj")
        for key, value, choices in (
            ("router_input", self.router_input, ROUTER_INPUTS),
            ("routing", self.routing, ROUTINGS),
        ):
            if value not in choices:
                raise UserError(f"{where}: {key}={value!r}; choose one of {', '.join(choices)}")
        if type(self.top_k) is not int or not 1 <= self.top_k <= count:
            raise UserError(f"{where}: top_k={self.top_k!r}; expected 1 to {count}, the number of experts")
        if type(self.bias) is not bool:
            raise UserError(f"{where}: bias={self.bias!r}; expected true or false")
        if type(self.seed) is not int or self.seed < 0:
            raise UserError(f"{where}: seed={self.seed!r}; expected an integer from 0")
        return self


def read_spec(config: PreTrainedConfig) -> MixseSpec | None:
    """The mixture that a configuration describes; None for any other model. UserError where it makes no sense."""
    values = getattr(config, KEY, None)
    if values is None:
        return None
    where = f"config.json, {KEY}"
    known = {field.name for field in fields(MixseSpec)}
    if not isinstance(values, Mapping) or not {"experts", "ranks", "scales", "targets"} <= set(values) <= known:
        raise UserError(f"{where}: expected an object with some of the keys {', '.join(sorted(known))}")
    for name in ("experts", "ranks", "scales", "targets"):
        if not isinstance(values[name], (list, tuple)):
            raise UserError(f"{where}: {name}={values[name]!r}; expected a list")
    return MixseSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}).check(where)
