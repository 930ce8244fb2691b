"""Expert files, in the formats of the ESFT repository: the scores of a task, and which experts train.

Layers go by the index of the decoder layer, as strings where they are keys of JSON; layers without experts are absent.
Whatever is read is checked, and a `UserError` says which file, where in it, and what is expected there.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.config.strict_json import as_mapping, read_json, short, write_json
from moe_dist.errors import UserError

KINDS = ("token", "gate")
DECIMALS = 4  # of the published scores, and selection runs on the rounded values
EXTRA = "moe_dist"  # the key of a summary under which stands what the official format lacks


@dataclass(frozen=True)
class ExpertConfig:
    """What ESFT trains: {layer index: expert ids, highest score first}, and two groups of other parameters."""

    experts: dict[str, list[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False


@dataclass(frozen=True)
class Summary:
    """Scores of a task: {kind: {layer index: [score of each expert]}}, and what the official format lacks."""

    scores: dict[str, dict[str, list[float]]]
    extra: dict[str, Any] = field(default_factory=dict)

    def of_kind(self, kind: str, *, where: str = "these scores") -> dict[str, list[float]]:
        """The token or gate scores; UserError where there are none."""
        if kind not in self.scores:
            raise UserError(f"{where}: no {kind}_scores; there is {', '.join(f'{k}_scores' for k in self.scores)}")
        return self.scores[kind]


def read_summary(path: str | Path) -> Summary:
    """Read a `summary.json`: token scores, gate scores, or both."""
    tree = read_json(path)
    scores = {}
    for kind in KINDS:
        if f"{kind}_scores" in tree:
            layers = as_mapping(tree[f"{kind}_scores"], f"{path}: {kind}_scores")
            scores[kind] = {
                _layer(layer, f"{path}: {kind}_scores"): _expert_scores(values, f"{path}: {kind}_scores: layer {layer}")
                for layer, values in _by_number(layers, f"{path}: {kind}_scores").items()
            }
    if not any(scores.values()):
        raise UserError(
            f'{path}: no scores; expected {{"token_scores": {{"1": {{"0": 0.0101, ...}}, ...}}, "gate_scores": ...}}'
        )
    return Summary(scores, as_mapping(tree.get(EXTRA, {}), f"{path}: {EXTRA}"))


def write_summary(path: str | Path, summary: Summary) -> None:
    """Write a `summary.json` with scores rounded to four decimals, and `extra` under a key of its own."""
    tree: dict[str, Any] = {
        f"{kind}_scores": {
            layer: {str(expert): round(float(score), DECIMALS) for expert, score in enumerate(values)}
            for layer, values in layers.items()
        }
        for kind, layers in summary.scores.items()
    }
    if summary.extra:
        tree[EXTRA] = summary.extra
    write_json(path, tree)


def read_expert_config(path: str | Path) -> ExpertConfig:
    """Read an expert config: which experts train, in the order in which they were selected."""
    tree = read_json(path)
    if "experts" not in tree:
        raise UserError(
            f'{path}: no "experts"; expected {{"experts": {{"1": [8, 26], ...}}, "shared_experts": false, ...}}'
        )
    experts = {}
    for layer, ids in _by_number(as_mapping(tree["experts"], f"{path}: experts"), f"{path}: experts").items():
        place = f"{path}: experts: layer {layer}"
        if not isinstance(ids, list) or any(type(expert) is not int or expert < 0 for expert in ids):
            raise UserError(f"{place}: {short(ids)} has to be a list of expert ids, numbers from 0")
        if len(set(ids)) != len(ids):
            raise UserError(f"{place}: {sorted({e for e in ids if ids.count(e) > 1})} named more than once")
        experts[_layer(layer, f"{path}: experts")] = list(ids)
    flags = {name: tree.get(name, False) for name in ("shared_experts", "non_expert_modules")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"{path}: {name}: {short(value)} has to be true or false")
    return ExpertConfig(experts, **flags)


def write_expert_config(path: str | Path, config: ExpertConfig) -> None:
    """Write an expert config as the official code reads it, layers in order of depth."""
    tree = {
        "experts": {str(layer): [int(expert) for expert in ids] for layer, ids in config.experts.items()},
        "shared_experts": config.shared_experts,
        "non_expert_modules": config.non_expert_modules,
    }
    write_json(path, tree)


def _layer(name: str, place: str) -> str:
    return str(_number(name, place, "the index of a layer"))


def _number(name: str, place: str, what: str) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", name):
        raise UserError(f"{place}: {name!r} has to be {what}, a number from 0")
    return int(name)


def _by_number(tree: dict[str, Any], place: str) -> dict[str, Any]:
    return dict(sorted(tree.items(), key=lambda item: _number(item[0], place, "the index of a layer")))


def _expert_scores(values: Any, place: str) -> list[float]:
    """Scores in order of expert ids, which have to be 0, 1, 2, ... without a gap."""
    found = {
        _number(expert, place, "the id of an expert"): score for expert, score in as_mapping(values, place).items()
    }
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise UserError(f"{place}: no score of expert(s) {short(missing)}; every expert of the layer needs one")
    for expert, score in found.items():
        if type(score) not in (int, float) or not (math.isfinite(score) and score >= 0):
            raise UserError(f"{place}, expert {expert}: {short(score)} has to be a number of at least 0")
    return [float(found[expert]) for expert in range(len(found))]
