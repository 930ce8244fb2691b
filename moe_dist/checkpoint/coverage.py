"""Do the fragments of all ranks make up every tensor exactly once? Asked before a save counts, and by `verify`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

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
    problems, reached, previous = [], 0, None
    for piece in sorted(pieces, key=lambda piece: (piece.range.offset, piece.range.length)):
        offset, length = piece.range.offset, piece.range.length
        if offset > reached:
            problems.append(f"{kind} of {_part(whole, reached, offset)}: in no file")
        if offset < reached and previous is not None:
            overlap = _part(whole, offset, min(reached, offset + length))
            problems.append(f"{kind} of {overlap}: twice, in {previous.file} and in {piece.file}")
        if previous is not None and piece.dtype != previous.dtype:
            problems.append(
                f"{kind} of {piece.range}: {piece.dtype} in {piece.file}, but {previous.dtype} in {previous.file}"
            )
        if offset + length >= reached:
            reached, previous = offset + length, piece
    if reached < whole.length:
        problems.append(f"{kind} of {_part(whole, reached, whole.length)}: in no file")
    if reached > whole.length and previous is not None:
        problems.append(f"{kind} of {previous.range} in {previous.file}: the tensor has {whole.length} elements only")
    return problems


def _part(whole: Range, start: int, stop: int) -> Range:
    return Range(whole.name, whole.expert, start, stop - start)
