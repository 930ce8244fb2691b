"""Saving: every rank writes the fragments that it owns; the step appears whole or not at all.

The way of a save: lay out (sizes are known, nothing is copied) -> a temporary folder, the disk asked for room -> each
rank streams its file and its index, hashed and synced -> one rank checks that the pieces make up every tensor, writes
the manifest, renames the folder, moves `latest`. After each stage the ranks tell one another how it went: if one
failed, the folder goes and all raise the same error.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.coverage import coverage_problems
from moe_dist.checkpoint.errors import CheckpointError, NoSpaceError
from moe_dist.checkpoint.folders import (
    clear_stale,
    new_temporary,
    point_latest,
    publish,
    step_folders,
    sync_folder,
    wait_until_visible,
)
from moe_dist.checkpoint.format import (
    MANIFEST,
    TENSORS,
    TRAINER_STATE,
    FileRecord,
    FrozenBase,
    Manifest,
    TensorInfo,
    encode,
    encode_manifest,
    encode_tensors,
    index_file,
    rank_file,
    read_manifest,
    step_name,
)
from moe_dist.checkpoint.fragments import Fragment
from moe_dist.checkpoint.group import SINGLE, Group, all_or_none
from moe_dist.checkpoint.index import Stored, decode_index, encode_index
from moe_dist.checkpoint.tensorfile import DTYPES, lay_out, write_layout, write_stream

# What a full disk, a full quota, and a limit on file sizes say.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBLEMS_SHOWN = 8


def save(
    root: str | Path,
    step: int,
    fragments: Mapping[str, Sequence[Fragment]],
    trainer_state: Mapping[str, Any],
    *,
    catalogue: Mapping[str, TensorInfo],
    frozen: FrozenBase | None = None,
    group: Group = SINGLE,
    visible_within_s: float = 60.0,
) -> Path:
    """Collective: write `root/step-<step>` and move `latest` to it; returns the folder.

    fragments: kind ("weights", "exp_avg", "exp_avg_sq", "buffers") -> the pieces that *this* rank owns, 1-D, on any
    device. Over all ranks they must make up each tensor of `catalogue`, the same on all ranks, exactly once.
    trainer_state: JSON values, rank 0's are stored.
    frozen: where the weights that do not train are; they are not copied.

    A folder of the same step is replaced. Raises CheckpointError (NoSpaceError: disk full) on every rank alike, with
    nothing of this step left behind and older checkpoints untouched.
    """
    begun = begin(
        root,
        step,
        fragments,
        trainer_state,
        catalogue=catalogue,
        frozen=frozen,
        group=group,
        visible_within_s=visible_within_s,
    )
    return finish(begun, begun.write)


@dataclass(frozen=True)
class Begun:
    """A save whose folder is there and whose files are laid out. `write` is this rank's own, and no collective."""

    task: _Save
    folder: Path
    needed: int

    def write(self) -> dict[str, FileRecord]:
        """Stream this rank's two files; their sizes and hashes."""
        return self.task.write(self.folder, self.needed)


def begin(
    root: str | Path,
    step: int,
    fragments: Mapping[str, Sequence[Fragment]],
    trainer_state: Mapping[str, Any],
    *,
    catalogue: Mapping[str, TensorInfo],
    frozen: FrozenBase | None = None,
    group: Group = SINGLE,
    visible_within_s: float = 60.0,
) -> Begun:
    """Collective: the first half of `save`, up to where bytes are written. Arguments and errors are those of `save`."""
    assert step >= 0, step
    task = _Save(Path(root), step, fragments, trainer_state, catalogue, frozen, group, visible_within_s)
    outlines = all_or_none(group, task.prepare, what=_not_saved(step))
    needed = sum(size for size, _ in outlines)
    opened = all_or_none(
        group, lambda: task.open_folder(needed, outlines) if group.rank == 0 else None, what=_not_saved(step)
    )
    return Begun(task, Path(opened[0]), needed)


def finish(begun: Begun, write: Callable[[], dict[str, FileRecord]]) -> Path:
    """Collective: the second half of `save`. `write` is `begun.write`, or gives what that has given elsewhere."""
    task, folder, needed = begun.task, begun.folder, begun.needed
    group, lead, what = task.group, task.group.rank == 0, _not_saved(task.step)
    try:
        written = all_or_none(group, write, what=what)
        final = all_or_none(group, lambda: task.commit(folder, needed, written) if lead else None, what=what)[0]
    except CheckpointError:
        if lead:
            shutil.rmtree(folder, ignore_errors=True)
        group.gather(None)  # no rank goes on before the folder is gone
        raise
    all_or_none(
        group,
        lambda: point_latest(task.root, final) if lead else None,
        what=f"checkpoint step {task.step} is saved, but `latest` could not be moved to it",
    )
    return task.root / final


def _not_saved(step: int) -> str:
    return f"checkpoint step {step} was not saved"


@dataclass
class _Save:
    """The stages of one save on one rank. Each may raise; `all_or_none` around it makes the ranks agree."""

    root: Path
    step: int
    fragments: Mapping[str, Sequence[Fragment]]
    trainer_state: Mapping[str, Any]
    catalogue: Mapping[str, TensorInfo]
    frozen: FrozenBase | None
    group: Group
    patience_s: float

    def prepare(self) -> tuple[int, str]:
        """Lay this rank's files out. (bytes that they will take, digest of the catalogue)."""
        file = rank_file(self.group.rank)
        stored, named = [], []
        for kind, pieces in self.fragments.items():
            for piece in pieces:
                entry = Stored(file, kind, piece.range, DTYPES.get(piece.tensor.dtype, str(piece.tensor.dtype)))
                stored.append(entry)
                named.append((entry.key, piece.tensor))
        self.layout = lay_out(named)
        self.index = encode_index(self.group.rank, file, stored)
        tensors = encode_tensors(self.catalogue, self.frozen)
        size = self.layout.bytes + len(self.index)
        if self.group.rank == 0:
            state = encode(self.trainer_state, where=TRAINER_STATE, indent=1)
            self.shared_files = {TENSORS: tensors, TRAINER_STATE: state}
            # The manifest cannot be sized before the hashes are known; this is above what it takes.
            size += len(tensors) + len(state) + 1024 + 512 * self.group.size
        return size, hashlib.sha256(tensors).hexdigest()

    def open_folder(self, needed: int, outlines: Sequence[tuple[int, str]]) -> str:
        odd = [rank for rank, (_, digest) in enumerate(outlines) if digest != outlines[0][1]]
        if odd:
            raise CheckpointError(f"rank 0 and ranks {odd} disagree on which tensors the checkpoint holds")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            clear_stale(self.root)
            free = shutil.disk_usage(self.root).free
            if needed > free:
                raise NoSpaceError(_no_space(needed, free, self.root))
            return str(new_temporary(self.root, self.step))
        except OSError as error:
            raise self._explain(error, needed) from error

    def write(self, folder: Path, needed: int) -> dict[str, FileRecord]:
        """Stream this rank's two files."""
        wait_until_visible(folder, seconds=self.patience_s)
        rank = self.group.rank
        try:
            data = write_layout(folder / rank_file(rank), self.layout)
            index = write_stream(folder / index_file(rank), iter([self.index]))
            sync_folder(folder)
        except OSError as error:
            raise self._explain(error, needed) from error
        return {rank_file(rank): data, index_file(rank): index}

    def commit(self, folder: Path, needed: int, written: Sequence[Mapping[str, FileRecord]]) -> str:
        """Rank 0: check what all have written, then make it the checkpoint of this step."""
        files = {name: record for part in written for name, record in part.items()}
        for name, record in files.items():
            wait_until_visible(folder / name, seconds=self.patience_s, size=record.size)
        self._check_coverage(folder)
        try:
            for name, data in self.shared_files.items():
                files[name] = write_stream(folder / name, iter([data]))
            manifest = Manifest(self.step, _next_serial(self.root), self.group.size, files)
            write_stream(folder / MANIFEST, iter([encode_manifest(manifest)]))
            sync_folder(folder)
            publish(folder, self.root / step_name(self.step))
        except OSError as error:
            raise self._explain(error, needed) from error
        return step_name(self.step)

    def _check_coverage(self, folder: Path) -> None:
        stored = []
        for rank in range(self.group.size):
            name = index_file(rank)
            stored += decode_index((folder / name).read_bytes(), where=name)
        problems = coverage_problems(self.catalogue, stored)
        if problems:
            more = len(problems) - _PROBLEMS_SHOWN
            shown = "; ".join(problems[:_PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            raise CheckpointError(f"the ranks' fragments do not make up the tensors: {shown}")

    def _explain(self, error: OSError, needed: int) -> CheckpointError:
        where = error.filename or self.root
        if error.errno in _FULL:
            return NoSpaceError(f"{_no_space(needed, _free(self.root), self.root)} ({os.strerror(error.errno)})")
        return CheckpointError(f"{where}: {error.strerror or error}")


def _no_space(needed: int, free: int, root: Path) -> str:
    return f"no space in {root}: {needed:,} bytes needed, {free:,} free"


def _free(root: Path) -> int:
    """Bytes free where the folder is or would be."""
    while not root.exists() and root != root.parent:
        root = root.parent
    return shutil.disk_usage(root).free


def _next_serial(root: Path) -> int:
    serials = [0]
    for path in step_folders(root):
        try:
            serials.append(read_manifest(path).serial)
        except CheckpointError:
            continue  # a torn folder was never a save that counted
    return max(serials) + 1
