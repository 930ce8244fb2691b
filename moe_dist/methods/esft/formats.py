"""The files of the ESFT repository: scores (`summary.json`), expert configs, and router logs.

Layers go by the index of the decoder layer, as strings where they are keys of JSON; layers without experts are absent.
Whatever is read is checked, and a `UserError` says which file, where in it, and what is expected there. Files are
written whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.errors import UserError

KINDS = ("token", "gate")
DECIMALS = 4  # of the published scores, and selection runs on the rounded values
EXTRA = "moe_dist"  # the key of a summary under which stands what the official format lacks
_LOG_NAME = re.compile(r"expert_weights_(\d+)\.txt")


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
            layers = _mapping(tree[f"{kind}_scores"], f"{path}: {kind}_scores")
            scores[kind] = {
                _layer(layer, f"{path}: {kind}_scores"): _expert_scores(values, f"{path}: {kind}_scores: layer {layer}")
                for layer, values in _by_number(layers, f"{path}: {kind}_scores").items()
            }
    if not any(scores.values()):
        raise UserError(
            f'{path}: no scores; expected {{"token_scores": {{"1": {{"0": 0.0101, ...}}, ...}}, "gate_scores": ...}}'
        )
    return Summary(scores, _mapping(tree.get(EXTRA, {}), f"{path}: {EXTRA}"))


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
    for layer, ids in _by_number(_mapping(tree["experts"], f"{path}: experts"), f"{path}: experts").items():
        place = f"{path}: experts: layer {layer}"
        if not isinstance(ids, list) or any(type(expert) is not int or expert < 0 for expert in ids):
            raise UserError(f"{place}: {_short(ids)} has to be a list of expert ids, numbers from 0")
        if len(set(ids)) != len(ids):
            raise UserError(f"{place}: {sorted({e for e in ids if ids.count(e) > 1})} named more than once")
        experts[_layer(layer, f"{path}: experts")] = list(ids)
    flags = {name: tree.get(name, False) for name in ("shared_experts", "non_expert_modules")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"{path}: {name}: {_short(value)} has to be true or false")
    return ExpertConfig(experts, **flags)


def write_expert_config(path: str | Path, config: ExpertConfig) -> None:
    """Write an expert config as the official code reads it, layers in order of depth."""
    tree = {
        "experts": {str(layer): [int(expert) for expert in ids] for layer, ids in config.experts.items()},
        "shared_experts": config.shared_experts,
        "non_expert_modules": config.non_expert_modules,
    }
    write_json(path, tree)


@dataclass(frozen=True)
class RouterLog:
    """One layer's routing: a pair of arrays ids `[T,K]` int64 and weights `[T,K]` float64 for each forward pass."""

    passes: list[tuple[np.ndarray, np.ndarray]]


def read_router_log(path: str | Path, *, top_k: int) -> RouterLog:
    """Read an `expert_weights_<layer>.txt`: a line for each forward pass, ids and weights of its tokens.

    Ids stand token by token, top_k for each, TAB between them; an empty field parts them from as many weights.
    """
    if top_k < 1:
        raise UserError(f"top_k={top_k}: has to be at least 1")
    passes = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        place = f"{path}:{number}"
        left, parted, right = line.partition("\t\t")
        if not parted:
            raise UserError(f"{place}: no empty field between ids and weights; was the file cut short?")
        try:
            ids = np.array(left.split("\t"), dtype=np.int64)
            weights = np.array(right.split("\t"), dtype=np.float64)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if len(ids) != len(weights):
            raise UserError(f"{place}: {len(ids)} ids but {len(weights)} weights; was the file cut short?")
        if len(ids) % top_k:
            raise UserError(f"{place}: {len(ids)} ids are no whole number of tokens at {top_k} experts a token")
        if ids.min() < 0 or not np.isfinite(weights).all():
            raise UserError(f"{place}: an id below zero, or a weight that is no finite number")
        passes.append((ids.reshape(-1, top_k), weights.reshape(-1, top_k)))
    if not passes:
        raise UserError(f"{path}: is empty")
    return RouterLog(passes)


def find_router_logs(folder: str | Path) -> dict[str, list[Path]]:
    """{layer index: its logs, one of each rank} below a folder, layers in order of depth."""
    logs: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).rglob("expert_weights_*.txt")):
        if found := _LOG_NAME.fullmatch(path.name):
            logs.setdefault(str(int(found[1])), []).append(path)
    if not logs:
        raise UserError(f"{folder}: no router logs there; they are called expert_weights_<layer>.txt")
    return dict(sorted(logs.items(), key=lambda item: int(item[0])))


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; UserError for anything else, also for a key that stands twice and for NaN."""
    try:
        tree = json.loads(_text(path), object_pairs_hook=_once, parse_constant=_no_constant)
    except ValueError as error:  # also what the two hooks raise
        raise UserError(f"{path}: no valid JSON: {error}") from None
    return _mapping(tree, str(path))


def write_json(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write one line of JSON by way of a temporary file: the old content stays until the new one is whole."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(tree, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, IsADirectoryError):
            raise UserError(f"{path}: is a folder; give the name of a file") from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return tree


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: {_short(value)} has to be an object, {{...}}")
    return value


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
    found = {_number(expert, place, "the id of an expert"): score for expert, score in _mapping(values, place).items()}
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise UserError(f"{place}: no score of expert(s) {_short(missing)}; every expert of the layer needs one")
    for expert, score in found.items():
        if type(score) not in (int, float) or not (math.isfinite(score) and score >= 0):
            raise UserError(f"{place}, expert {expert}: {_short(score)} has to be a number of at least 0")
    return [float(found[expert]) for expert in range(len(found))]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
