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
    ((4, 4), (1, 2, 1)),
    ((4, 4), (1, 4, 1)),
    ((4, 2), (1, 2, 2)),
    ((4, 2), (2, 1, 2)),
    ((4, 1), (2, 2, 1)),
)
TRAINABLE = ("all", "some", "one rank")
AXES = (FAMILIES, LAYOUTS, STAGES, TRAINABLE, BALANCE, RECOMPUTE, tuple(WAYS))
EVERYTHING = Cell("qwen3_moe", (8, 4), 2, "some", 300, "hf", True, "dedup", (2, 2, 2))


def axis_cells() -> list[Cell]:
    """A covering set of cells, and one with all axes at once on 8 ranks."""
    cells = [
        Cell(family, layout, stage, trainable, 300, balance, recompute, way, axes)
        for family, (layout, axes), stage, trainable, balance, recompute, way in covering(AXES)
    ]
    return [*cells, EVERYTHING]
