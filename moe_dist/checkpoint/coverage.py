"""Do the fragments of all ranks make up every tensor exactly once? Asked before a save counts, and by `verify`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

from moe_dist.checkpoint.blocks import Block, bands, blocks_of, split_rows, width_of
from moe_dist.checkpoint.format import TensorInfo
from moe_dist.checkpoint.fragments import Range
from moe_dist.checkpoint.index import Stored


def coverage_problems(catalogue: Mapping[str, TensorInfo], stored: Iterable[Stored]) -> list[str]:
    """A line for every hole, overlap, stranger and change of dtype; each line names the tensor and its files."""
    pieces: dict[tuple[str, str, int], list[Stored]] = defaultdict(list)
    for piece in stored:
        pieces[piece.kind, piece.range.name, piece.range.expert].append(piece)
    problems = []
    for name, info in sorted(catalogue.items()):
        for kind in info.kinds:
            for expert in info.expert_ids:
                problems += _tiling(kind, Range(name, expert, 0, info.numel), pieces.pop((kind, name, expert), []))
    for (kind, _, _), strangers in sorted(pieces.items()):
        files = sorted({piece.file for piece in strangers})
        problems.append(f"{kind} of {strangers[0].range} in {', '.join(files)}: not among the checkpoint's tensors")
    return problems


def catalogue_differences(held: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo]) -> list[str]:
    """Why a checkpoint that holds `held` is not one of a run that trains `wanted`; both ways, tensor by tensor."""
    lines = []
    for name in sorted(held.keys() | wanted.keys()):
        if name not in held:
            lines.append(f"{name}: not in the checkpoint")
        elif name not in wanted:
            lines.append(f"{name}: in the checkpoint, not in this run")
        else:
            lines += [f"{name}: {line}" for line in _differences(held[name], wanted[name])]
    return lines


def _differences(held: TensorInfo, wanted: TensorInfo) -> list[str]:
    lines = []
    if held.shape != wanted.shape:
        lines.append(f"shape {held.shape} in the checkpoint, {wanted.shape} in this run")
    there, here = set(held.expert_ids), set(wanted.expert_ids)
    if (held.experts is None) != (wanted.experts is None):
        lines.append("experts' in one, not in the other")
    elif here != there:
        lines += [f"experts {sorted(here - there)} not in the checkpoint"] if here - there else []
        lines += [f"experts {sorted(there - here)} in the checkpoint, not in this run"] if there - here else []
    missing = [kind for kind in wanted.kinds if kind not in held.kinds]
    if missing:
        lines.append(f"no {', '.join(missing)} in the checkpoint")
    return lines


def _tiling(kind: str, whole: Range, pieces: list[Stored]) -> list[str]:
    ranges = [piece.range for piece in pieces]
    width = width_of(ranges, whole.length)
    placed = [(block, piece) for piece in pieces for block in blocks_of(piece.range, width)]
    problems = []
    for top, bottom, stop, row in bands(placed, split_rows(0, whole.length, width)):
        problems += _row_problems(
            kind, row, stop, lambda start, end, t=top, b=bottom: _part(whole, width, t, b, start, end)
        )
    for one, other in pairwise(sorted(pieces, key=lambda piece: (piece.range.offset, piece.range.length))):
        if one.dtype != other.dtype:
            problems.append(f"{kind} of {other.range}: {other.dtype} in {other.file}, but {one.dtype} in {one.file}")
    last = max(pieces, key=lambda piece: piece.range.end, default=None)
    if last is not None and last.range.end > whole.length:
        problems.append(f"{kind} of {last.range} in {last.file}: the tensor has {whole.length} elements only")
    return problems


def _row_problems(
    kind: str, row: list[tuple[Block, Stored]], stop: int, part: Callable[[int, int], Range]
) -> list[str]:
    """What is wrong in a row of `stop` elements; part(start, end) names elements of it."""
    problems, reached, previous = [], 0, None
    for block, piece in row:
        if block.column > reached:
            problems.append(f"{kind} of {part(reached, block.column)}: in no file")
        if block.column < reached and previous is not None:
            overlap = part(block.column, min(reached, block.right))
            problems.append(f"{kind} of {overlap}: twice, in {previous.file} and in {piece.file}")
        if block.right >= reached:
            reached, previous = block.right, piece
    if reached < stop:
        problems.append(f"{kind} of {part(reached, stop)}: in no file")
    return problems


def _part(whole: Range, width: int, top: int, bottom: int, start: int, stop: int) -> Range:
    """Columns `[start, stop)` of rows `[top, bottom)`."""
    repeated = (bottom - top, width) if bottom - top > 1 else (1, 0)
    return Range(whole.name, whole.expert, top * width + start, stop - start, *repeated)
