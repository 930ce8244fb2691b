"""The cells of the Megatron axes: each alone, each pair, and each folded with experts, beside what else may vary."""

from __future__ import annotations

from tests.parity.cells import BALANCE, RECOMPUTE, STAGES, WAYS, Cell, covering

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2")
# (ranks, expert-parallel size), (pipeline, sequence, tensor)
LAYOUTS = (
    ((2, 1), (1, 1, 2)),
    ((2, 2), (1, 1, 2)),
    ((2, 1), (1, 2, 1)),
    ((2, 2), (1, 2, 1)),
    ((2, 1), (2, 1, 1)),
    ((4, 2), (2, 1, 1)),
    ((4, 4), (1, 1, 2)),
    ((4, 4), (1, 4, 1)),
    ((4, 2), (1, 2, 2)),
    ((4, 2), (2, 1, 2)),
    ((4, 1), (2, 2, 1)),
)
TRAINABLE = ("all", "some", "one rank")
AXES = (FAMILIES, LAYOUTS, STAGES, TRAINABLE, BALANCE, RECOMPUTE, tuple(WAYS))
EVERYTHING = Cell("qwen3_moe", (8, 4), 2, "some", 300, "hf", True, "dedup", (2, 2, 2))


def _fits(chosen: dict) -> bool:
    """The dense first layer of DeepSeek-V2 would be a stage without anything to train where only experts train."""
    family, layout, trainable = chosen.get(0), chosen.get(1), chosen.get(3)
    return not (family == "deepseek_v2" and layout and layout[1][0] > 1 and trainable == "one rank")


def axis_cells() -> list[Cell]:
    """A covering set of cells, and one with all axes at once on 8 ranks."""
    cells = [
        Cell(family, layout, stage, trainable, 300, balance, recompute, way, axes)
        for family, (layout, axes), stage, trainable, balance, recompute, way in covering(AXES, _fits)
    ]
    return [*cells, EVERYTHING]
