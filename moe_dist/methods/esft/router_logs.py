"""Router logs of the ESFT repository: what DeepSeek's published model code writes when it is told to log routing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_dist.config.strict_json import read_text
from moe_dist.errors import UserError

_LOG_NAME = re.compile(r"expert_weights_(\d+)\.txt")


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
    for number, line in enumerate(read_text(path).splitlines(), start=1):
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
