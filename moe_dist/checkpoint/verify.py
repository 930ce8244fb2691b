"""Is a checkpoint whole? Every file against its sha256, every tensor against the catalogue, every value finite."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_dist.checkpoint.coverage import coverage_problems
from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.format import (
    MANIFEST,
    TENSORS,
    TRAINER_STATE,
    Manifest,
    decode_tensors,
    file_problem,
    index_file,
    read_json,
    read_manifest,
)
from moe_dist.checkpoint.group import SINGLE, Group
from moe_dist.checkpoint.index import Stored, read_index
from moe_dist.checkpoint.tensorfile import TensorFile

_READ_BYTES = 16 << 20
_AT_ONCE = 1 << 22  # elements, so that a big tensor costs no big mask
_SHOWN = 8


@dataclass(frozen=True)
class Problem:
    """`file` is the damaged file's name within the checkpoint."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class Report:
    path: Path
    files: int
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def brief(self) -> str:
        """The first few problems on one line, and how many there are besides."""
        shown, more = self.problems[:_SHOWN], len(self.problems) - _SHOWN
        return "; ".join(map(str, shown)) + (f"; and {more} more" if more > 0 else "")

    def raise_if_bad(self) -> None:
        if self.problems:
            raise CheckpointError(f"{self.path}: {self.brief()}")

    def __str__(self) -> str:
        if self.ok:
            return f"{self.path}: whole, {self.files} files, {self.bytes:,} bytes"
        return "\n".join([f"{self.path}: damaged", *(f"  {problem}" for problem in self.problems)])


def verify(path: str | Path, *, group: Group = SINGLE) -> Report:
    """Collective: read every byte of a checkpoint folder once, the files shared out over the ranks; one report for all.

    Damage is reported, never raised: each missing, cut, changed or swapped file by name, each hole or overlap in a
    tensor, each expert that is absent, each value that is not finite.
    """
    path = Path(path)
    manifest, fault = None, None
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        fault = Problem(MANIFEST, str(error))
    faults = [found for found in group.gather(fault) if found]
    if manifest is None or faults:
        return Report(path, 0, 0, tuple(faults[:1]))

    problems = _gathered(group, _check_files(path, manifest, group))
    damaged = {problem.file for problem in problems}
    if not any(name.endswith(".json") for name in damaged):
        problems += _gathered(group, _check_contents(path, manifest, group, damaged))
    return Report(path, len(manifest.files), manifest.bytes, tuple(problems))


def _gathered(group: Group, mine: list[Problem]) -> list[Problem]:
    return [problem for part in group.gather(mine) for problem in part]


def _share(manifest: Manifest, group: Group) -> list[str]:
    return sorted(manifest.files)[group.rank :: group.size]


def _check_files(path: Path, manifest: Manifest, group: Group) -> list[Problem]:
    """This rank's share of the files: there, of full size, with the bytes that were written."""
    problems = []
    for name in _share(manifest, group):
        try:
            what = file_problem(path, name, manifest.files[name]) or _hash_problem(path, manifest, name)
        except OSError as error:
            what = f"not readable ({error.strerror})"
        if what:
            problems.append(Problem(name, what))
    return problems


def _check_contents(path: Path, manifest: Manifest, group: Group, damaged: set[str]) -> list[Problem]:
    """Tensors of this rank's share of the files against their index; on rank 0, all of them against the catalogue."""
    problems, by_file = [], defaultdict(list)
    for rank in range(manifest.world):
        try:
            for piece in read_index(path, manifest, rank):
                by_file[piece.file].append(piece)
        except CheckpointError as error:
            problems.append(Problem(index_file(rank), str(error)))
    for name in _share(manifest, group):
        if name in by_file and name not in damaged:
            problems += [Problem(name, what) for what in _tensor_problems(path, name, by_file[name])]
    if group.rank == 0:
        try:
            catalogue, _ = decode_tensors(read_json(path, manifest, TENSORS), where=f"{path}/{TENSORS}")
            stored = [piece for pieces in by_file.values() for piece in pieces]
            problems += [Problem(TENSORS, what) for what in coverage_problems(catalogue, stored)]
            read_json(path, manifest, TRAINER_STATE)
        except CheckpointError as error:
            problems.append(Problem(TENSORS, str(error)))
    return problems


def file_sha256(path: Path) -> str:
    """Of all that the file holds now. OSError as the system raises it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _hash_problem(path: Path, manifest: Manifest, name: str) -> str | None:
    found = file_sha256(path / name)
    if found == manifest.files[name].sha256:
        return None
    owner = next((other for other, record in manifest.files.items() if record.sha256 == found), None)
    return f"holds the content of {owner}" if owner else "its content is not what was saved (sha256 differs)"


def _tensor_problems(path: Path, name: str, stored: list[Stored]) -> list[str]:
    problems = []
    try:
        file = TensorFile(path / name)
    except CheckpointError as error:
        return [str(error)]
    for piece in stored:
        length = piece.range.numel
        try:
            tensor = file.read(piece.key, 0, length, dtype=piece.dtype, numel=length)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if tensor.is_floating_point() and not all(bool(torch.isfinite(part).all()) for part in tensor.split(_AT_ONCE)):
            problems.append(f"{piece.kind} of {piece.range}: a value is not finite")
    return problems
