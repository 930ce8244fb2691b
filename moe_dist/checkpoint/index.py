"""The index of one rank's file: what each of its tensors is a piece of, and the rank's own state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.format import Manifest, check_plain_name, decode, encode, index_file, read_json
from moe_dist.checkpoint.fragments import NOT_EXPERT, Range


@dataclass(frozen=True)
class Stored:
    """A fragment as its file holds it: a 1-D tensor of `range.numel` elements."""

    file: str
    kind: str
    range: Range
    dtype: str

    @property
    def key(self) -> str:
        """Its name within the safetensors file; readable with safetensors alone."""
        at = self.range
        expert = "" if at.expert == NOT_EXPERT else f"[{at.expert}]"
        return f"{self.kind}/{at.name}{expert}@{at.offset}"


def encode_index(rank: int, file: str, stored: Sequence[Stored]) -> bytes:
    fragments = [
        {
            "kind": piece.kind,
            "name": piece.range.name,
            "expert": piece.range.expert,
            "offset": piece.range.offset,
            "length": piece.range.length,
            "dtype": piece.dtype,
            **({"runs": piece.range.runs, "stride": piece.range.stride} if piece.range.runs > 1 else {}),
        }
        for piece in stored
    ]
    value = {"rank": rank, "file": file, "fragments": fragments}
    return encode(value, where=f"index of rank {rank}")


def decode_index(data: bytes, *, where: str) -> list[Stored]:
    """The fragments. A file name that leaves the folder is refused, so is a negative offset."""
    value = decode(data, where=where)
    try:
        file = check_plain_name(value["file"], where=where)
        stored = [
            Stored(
                file,
                str(entry["kind"]),
                Range(
                    str(entry["name"]),
                    int(entry["expert"]),
                    int(entry["offset"]),
                    int(entry["length"]),
                    int(entry.get("runs", 1)),
                    int(entry.get("stride", 0)),
                ),
                str(entry["dtype"]),
            )
            for entry in value["fragments"]
        ]
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{where}: not an index ({type(error).__name__}: {error})") from None
    for piece in stored:
        at = piece.range
        apart = at.runs == 1 or (at.runs > 1 and at.stride >= at.length)
        if at.offset < 0 or at.length < 1 or at.expert < NOT_EXPERT or not apart:
            raise CheckpointError(f"{where}: impossible fragment {piece.kind} of {at}")
    return stored


def read_index(folder: Path, manifest: Manifest, rank: int) -> list[Stored]:
    """The index that one of the writing ranks left; the file that it speaks of is one that the manifest lists."""
    name = index_file(rank)
    stored = decode_index(read_json(folder, manifest, name), where=f"{folder}/{name}")
    for piece in stored:
        if piece.file not in manifest.files:
            raise CheckpointError(f"{folder}/{name}: speaks of {piece.file}, which the manifest does not list")
    return stored
