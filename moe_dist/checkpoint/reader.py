"""Reading ranges of a checkpoint, whatever ranks wrote it: they are cut from the fragments that hold them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from moe_dist.checkpoint.blocks import Block, bands, blocks_of, width_of
from moe_dist.checkpoint.coverage import catalogue_differences
from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.fingerprint import fingerprint
from moe_dist.checkpoint.format import (
    TENSORS,
    TRAINER_STATE,
    Manifest,
    TensorInfo,
    check_sizes,
    decode,
    decode_tensors,
    read_json,
)
from moe_dist.checkpoint.fragments import NOT_EXPERT, Place, Range, label
from moe_dist.checkpoint.index import Stored, read_index
from moe_dist.checkpoint.tensorfile import DTYPES, TensorFile
from moe_dist.checkpoint.verify import verify as verify_all

_DIFFERENCES_SHOWN = 8
_TORCH_DTYPES = {text: dtype for dtype, text in DTYPES.items()}


class Checkpoint:
    """An open checkpoint; use it in a `with`.

    Attributes: path, step, world (ranks that wrote it), trainer_state, catalogue (name -> TensorInfo), frozen
    (FrozenBase or None).
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.step = manifest.step
        self.world = manifest.world
        self.trainer_state = decode(read_json(path, manifest, TRAINER_STATE), where=f"{path}/{TRAINER_STATE}")
        self.catalogue, self.frozen = decode_tensors(read_json(path, manifest, TENSORS), where=f"{path}/{TENSORS}")
        pieces: dict[tuple[str, str, int], list[Stored]] = defaultdict(list)
        for rank in range(manifest.world):
            for piece in read_index(path, manifest, rank):
                pieces[piece.kind, piece.range.name, piece.range.expert].append(piece)
        self._pieces = dict(pieces)
        self._placed: dict[tuple[str, str, int, int], list[tuple[Block, Stored]]] = {}
        self._files: dict[str, TensorFile] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapped files. What was read is the caller's own memory."""
        self._files.clear()

    def read(self, kind: str, wanted: Sequence[Range]) -> list[torch.Tensor]:
        """The ranges, in order, as new 1-D tensors of the stored dtype; an absent one is a CheckpointError."""
        tensors = []
        for at in wanted:
            first = self._holders(kind, at)[0]
            tensor = torch.empty(at.numel, dtype=_TORCH_DTYPES[first.dtype])
            self.fill(kind, [Place(at, 0)], tensor)
            tensors.append(tensor)
        return tensors

    def fill(self, kind: str, places: Sequence[Place], flat: torch.Tensor) -> None:
        """Copy each place's range to its elements of `flat` (1-D, the stored dtype, any device); no others are touched.

        Straight from the mapped file, each byte once: the memory that it takes is `flat`.
        """
        assert flat.dim() == 1, tuple(flat.shape)
        with torch.no_grad():
            for place in places:
                self._copy(kind, place, flat)

    def tensor(self, kind: str, name: str, expert: int = NOT_EXPERT) -> torch.Tensor:
        """One whole tensor, or one whole expert of it, in its shape."""
        info = self.catalogue.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: holds no tensor {name}")
        if info.numel == 0:
            return torch.empty(info.shape)
        return self.read(kind, [Range(name, expert, 0, info.numel)])[0].view(info.shape)

    def check_matches(self, catalogue: Mapping[str, TensorInfo]) -> None:
        """CheckpointError unless the checkpoint holds just the tensors and experts of a run that trains `catalogue`.

        The number of ranks, their experts and ZeRO's cuts play no part. Cheap: ask before anything is loaded. Kinds
        that the run does not want may be there.
        """
        differences = catalogue_differences(self.catalogue, catalogue)
        if differences:
            more = len(differences) - _DIFFERENCES_SHOWN
            shown = "; ".join(differences[:_DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            raise CheckpointError(f"{self.path}: not a checkpoint of this run: {shown}")

    def check_base(self, folder: str | Path) -> None:
        """CheckpointError unless `folder` holds the very frozen weights that this checkpoint was trained with."""
        if self.frozen is None:
            return
        found = fingerprint(folder, how=self.frozen.fingerprint.partition(":")[0])
        if found != self.frozen.fingerprint:
            raise CheckpointError(
                f"{folder}: not the base model of {self.path}: its tensors give {found}, the checkpoint was trained on "
                f"{self.frozen.folder} with {self.frozen.fingerprint}"
            )

    def _copy(self, kind: str, place: Place, flat: torch.Tensor) -> None:
        at = place.range
        pieces = self._holders(kind, at)
        width = width_of([*(piece.range for piece in pieces), at], at.end)
        held = self._blocks(kind, at, pieces, width)
        for wanted in blocks_of(at, width):
            target = flat[place.start + wanted.start :][: wanted.rows * wanted.columns].view(
                wanted.rows, wanted.columns
            )
            overlapping = []
            for block, piece in held:
                common = wanted.common(block)
                if common is not None:
                    overlapping.append((common, piece))
                    part = target[common.row - wanted.row : common.bottom - wanted.row]
                    part = part[:, common.column - wanted.column : common.right - wanted.column]
                    part.copy_(self._elements(piece, block, common, flat.dtype))
            for top, bottom, _, row in bands(overlapping, [wanted]):
                reached = wanted.column
                for block in [*(block for block, _ in row), Block(top, 1, wanted.right, 0, 0)]:
                    if block.column > reached:
                        repeated = (bottom - top, width) if bottom - top > 1 else (1, 0)
                        missing = Range(at.name, at.expert, top * width + reached, block.column - reached, *repeated)
                        raise CheckpointError(f"{self.path}: {kind} of {missing}: in no file")
                    reached = max(reached, block.right)

    def _elements(self, piece: Stored, block: Block, part: Block, dtype: torch.dtype) -> torch.Tensor:
        """`part` of a block of a stored fragment, `[rows, columns]`."""
        if piece.dtype != DTYPES[dtype]:
            raise CheckpointError(f"{self.path}: {piece.kind} of {piece.range} is {piece.dtype}, not {DTYPES[dtype]}")
        first = block.start + (part.row - block.row) * block.columns + part.column - block.column
        stop = first + (part.rows - 1) * block.columns + part.columns
        read = self._open(piece.file).read(piece.key, first, stop, dtype=piece.dtype, numel=piece.range.numel)
        return read.as_strided((part.rows, part.columns), (block.columns, 1))

    def _blocks(self, kind: str, at: Range, pieces: list[Stored], width: int) -> list[tuple[Block, Stored]]:
        key = (kind, at.name, at.expert, width)
        if key not in self._placed:
            self._placed[key] = [(block, piece) for piece in pieces for block in blocks_of(piece.range, width)]
        return self._placed[key]

    def _holders(self, kind: str, at: Range) -> list[Stored]:
        """The fragments of a tensor."""
        pieces = self._pieces.get((kind, at.name, at.expert))
        if not pieces:
            known = at.name in self.catalogue
            which = label(at.name, at.expert) if known else at.name
            raise CheckpointError(f"{self.path}: holds no {kind} of {which}")
        return pieces

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            self._files[file] = TensorFile(self.path / file)
        return self._files[file]


def open_checkpoint(path: str | Path, *, verify: str = "sizes") -> Checkpoint:
    """Open `.../step-N`. verify: "sizes" (all files there at full size, JSON by sha256) or "full" (every byte).

    CheckpointError names each file that is missing or damaged.
    """
    assert verify in ("sizes", "full"), verify
    path = Path(path)
    manifest = check_sizes(path)
    if verify == "full":
        verify_all(path).raise_if_bad()
    return Checkpoint(path, manifest)
