"""Ranges as blocks of a matrix: a tensor cut along an inner dimension is many runs, and still few blocks.

The flat tensor is seen as rows of `width` elements. A contiguous range is then at most three blocks (a part of a row,
whole rows, a part of a row), runs one row apart are one block, and what covers what is a question of a few rectangles
instead of one of thousands of runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from moe_dist.checkpoint.fragments import Range

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Rows `[row, row + rows)` and columns `[column, column + columns)`.

    Its elements lie one row after the other in the buffer of the range that it is a block of, from `start` on.
    """

    row: int
    rows: int
    column: int
    columns: int
    start: int

    @property
    def bottom(self) -> int:
        return self.row + self.rows

    @property
    def right(self) -> int:
        return self.column + self.columns

    def common(self, other: Block) -> Block | None:
        """What both cover, None where that is nothing; its `start` means nothing."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        rows, columns = min(self.bottom, other.bottom) - row, min(self.right, other.right) - column
        return Block(row, rows, column, columns, 0) if rows > 0 and columns > 0 else None


def split_rows(offset: int, length: int, width: int, *, start: int = 0) -> Iterator[Block]:
    """The blocks, three at most, of the elements `[offset, offset + length)` in rows of `width`."""
    position, stop = offset, offset + length
    while position < stop:
        row, column = divmod(position, width)
        columns = min(stop - position, width - column)
        rows = (stop - position) // width if columns == width else 1
        yield Block(row, rows, column, columns, start + position - offset)
        position += rows * columns


def width_of(ranges: Iterable[Range], numel: int) -> int:
    """The width in which these ranges of a tensor of `numel` elements are few blocks: the distance of their runs; where
    none has several, wide enough for all of them to lie in one row."""
    widest = numel
    for at in ranges:
        if at.runs > 1:
            return at.stride
        widest = max(widest, at.end)
    return max(widest, 1)


def blocks_of(at: Range, width: int) -> list[Block]:
    """The blocks of a range; a block a run where its runs are not one row apart."""
    if at.runs > 1 and at.stride == width:
        row, column = divmod(at.offset, width)
        if column + at.length <= width:
            return [Block(row, at.runs, column, at.length, 0)]
    return [
        block
        for run in range(at.runs)
        for block in split_rows(at.offset + run * at.stride, at.length, width, start=run * at.length)
    ]


def bands(placed: Iterable[tuple[Block, T]], area: Iterable[Block]) -> Iterator[tuple[int, int, int, list]]:
    """Bands of rows in which the same blocks lie, from the top of `area` to its bottom.

    area: blocks below one another that begin at the same column. Yields (first row, end row, end column of the area,
    the (block, T) pairs in these rows by column).
    """
    waiting = sorted(placed, key=lambda item: item[0].row, reverse=True)
    edges = {edge for block, _ in waiting for edge in (block.row, block.bottom)}
    active: list[tuple[Block, T]] = []
    for part in area:
        inside = {edge for edge in edges if part.row < edge < part.bottom}
        for top, bottom in pairwise(sorted({part.row, part.bottom} | inside)):
            while waiting and waiting[-1][0].row <= top:
                active.append(waiting.pop())
            active = [item for item in active if item[0].bottom > top]
            yield top, bottom, part.right, sorted(active, key=lambda item: (item[0].column, item[0].columns))
