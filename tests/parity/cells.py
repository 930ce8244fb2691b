"""The cells of the matrix, and a choice of them in which every pair of values of any two axes occurs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")
LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4))  # (ranks, expert-parallel size)
STAGES = (0, 1, 2, 3)
TRAINABLE = ("all", "some", "one rank", "one layer")
BUCKETS = (300, 50_000_000)  # elements: one that flushes all the time, and the default, which never does here
BALANCE = ("none", "hf")
RECOMPUTE = (False, True)
# How tokens travel: settings of `moe`, and whether the ranks are taken for two nodes.
WAYS = {
    "dedup": {"dispatcher": "dedup"},
    "alltoall": {"dispatcher": "alltoall", "chunks": 2},
    "node": {"dispatcher": "node", "wire": "float32"},
    "beside": {"dispatcher": "dedup", "chunks": 3, "overlap": True},
}


@dataclass(frozen=True)
class Cell:
    """One training to compare."""

    family: str
    layout: tuple[int, int]
    stage: int
    trainable: str
    bucket: int
    balance: str
    recompute: bool
    way: str = "dedup"
    axes: tuple[int, int, int] = (1, 1, 1)  # pipeline, sequence, tensor

    @property
    def world(self) -> int:
        return self.layout[0]

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all axes, as the grid takes them."""
        return {"expert": self.expert, **dict(zip(("pipeline", "sequence", "tensor"), self.axes, strict=True))}

    @property
    def data(self) -> int:
        """How many ranks read rows of their own."""
        return self.world // math.prod(self.axes)

    @property
    def expert(self) -> int:
        return self.layout[1]

    @property
    def moe(self) -> dict:
        """The settings of its way; what ZeRO 3 or an expert group of one rank does not allow is left out."""
        settings = dict(WAYS[self.way])
        if self.stage == 3:
            settings.pop("overlap", None)
        if self.way == "node" and self.expert == 1:
            settings["dispatcher"] = "auto"
        return settings

    @property
    def node_size(self) -> int | None:
        """Half of an expert group is a node where the way is that of nodes."""
        return self.expert // 2 if self.way == "node" and self.expert > 1 else None

    def __str__(self) -> str:
        return "-".join(
            [
                self.family,
                f"ranks{self.world}",
                f"ep{self.expert}",
                f"zero{self.stage}",
                self.trainable.replace(" ", ""),
                f"bucket{self.bucket}",
                self.balance,
                *(["recompute"] if self.recompute else []),
                self.way,
                *(f"{name}{size}" for name, size in self.sizes.items() if size > 1 and name != "expert"),
            ]
        )


AXES = (FAMILIES, LAYOUTS, STAGES, TRAINABLE, BUCKETS, BALANCE, RECOMPUTE, tuple(WAYS))


def every_cell() -> list[Cell]:
    return [Cell(*values) for values in product(*AXES)]


def covering_cells() -> list[Cell]:
    return [Cell(*values) for values in covering(AXES)]


def covering(axes: Sequence[Sequence]) -> list[tuple]:
    """A small set of choices, a value of each axis, with every pair of values of any two axes in at least one of them.

    Greedy and deterministic: each choice starts from a pair that is still missing and takes, axis after axis, the value
    that adds most missing pairs.
    """
    numbers = range(len(axes))
    missing = {((a, x), (b, y)) for a, b in combinations(numbers, 2) for x in axes[a] for y in axes[b]}
    found = []
    while missing:
        first = min(missing, key=repr)
        chosen = dict(first)
        for axis, values in enumerate(axes):
            if axis not in chosen:
                gains = [len(missing & _pairs({**chosen, axis: value}, axis)) for value in values]
                # Where several gain alike, go round, so that the values are used about equally.
                best = [value for value, gain in zip(values, gains, strict=True) if gain == max(gains)]
                chosen[axis] = best[len(found) % len(best)]
        found.append(tuple(chosen[axis] for axis in numbers))
        missing -= {pair for axis in numbers for pair in _pairs(chosen, axis)}
    return found


def _pairs(chosen: dict, axis: int) -> set:
    """All pairs of the chosen values that involve this axis."""
    mine = (axis, chosen[axis])
    return {tuple(sorted((mine, item), key=lambda pair: pair[0])) for item in chosen.items() if item[0] != axis}
