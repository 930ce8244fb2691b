"""What lies in a checkpoint folder, and its small JSON files. The bytes of tensors are tensorfile.py's.

    checkpoints/
      latest                      the name of the newest folder, moved last
      best                        that of the one with the lowest held-out loss, where a run keeps it
      step-40/
        rank-00000.safetensors    the fragments that rank 0 owned: flat 1-D tensors
        rank-00000.json           what each of them is a piece of
        tensors.json              every tensor held, its shape and expert ids; the base model's fingerprint
        trainer_state.json        step, sampler, schedule, optimizer step, config hash, ...
        manifest.json             size and sha256 of every file above and of itself; written last

Everything is JSON or safetensors: reading a checkpoint can run no code.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.fragments import NOT_EXPERT

VERSION = 2
_READABLE = (1, VERSION)  # 1 had no fragments of several runs
LATEST = "latest"
BEST = "best"
MANIFEST = "manifest.json"
TENSORS = "tensors.json"
TRAINER_STATE = "trainer_state.json"

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_STALE = re.compile(r"(step-(?:0|[1-9][0-9]{0,17}))\.(tmp|old)-[0-9a-f]+")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the checkpoint, whoever holds its pieces.

    `shape` is that of the whole tensor, or of one expert's where `experts` lists global expert ids. `experts` are those
    that the checkpoint must hold, from the placement of all ranks: a lost expert is found because it is listed here.
    `kinds` are the values kept for it: "weights", "exp_avg", "exp_avg_sq", "buffers".
    """

    shape: tuple[int, ...]
    experts: tuple[int, ...] | None = None
    kinds: tuple[str, ...] = ("weights", "exp_avg", "exp_avg_sq")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def expert_ids(self) -> tuple[int, ...]:
        return (NOT_EXPERT,) if self.experts is None else self.experts


@dataclass(frozen=True)
class FrozenBase:
    """Where the frozen weights are: a model folder, as the user wrote it, and the fingerprint of its tensors."""

    folder: str
    fingerprint: str


@dataclass(frozen=True)
class FileRecord:
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`serial` counts the saves of a run: after going back to an older step, the newest is not the highest step."""

    step: int
    serial: int
    world: int
    files: dict[str, FileRecord]

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.files.values())


def step_name(step: int) -> str:
    return f"step-{step}"


def step_of(name: str) -> int | None:
    """The step of a complete folder's name, None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def stale_of(name: str) -> tuple[str, str] | None:
    """("step-40", "tmp" or "old") for a folder that a save left behind, None for any other name."""
    match = _STALE.fullmatch(name)
    return (match.group(1), match.group(2)) if match else None


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def index_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def check_plain_name(name: Any, *, where: str) -> str:
    """A file name that stays in its folder, or an error. Names come from JSON that anyone may have written."""
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise CheckpointError(f"{where}: {name!r} is not a plain file name, refused")
    return name


def encode(value: Any, *, where: str, indent: int | None = None) -> bytes:
    """JSON bytes; an error names the first key whose value would not come back as it was."""
    _check_json(value, where)
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()


def _check_json(value: Any, where: str) -> None:
    if value is None or isinstance(value, (bool, int, str)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{where}: {value} cannot be stored")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: the key {key!r} is not a string")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_json(item, f"{where}[{number}]")
    else:
        raise CheckpointError(f"{where}: a {type(value).__name__} is no JSON value (a tuple is none either)")


def decode(data: bytes, *, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object was expected, not a {type(value).__name__}")
    return value


def encode_tensors(catalogue: Mapping[str, TensorInfo], frozen: FrozenBase | None) -> bytes:
    tensors = {
        name: {
            "shape": list(info.shape),
            "experts": None if info.experts is None else list(info.experts),
            "kinds": list(info.kinds),
        }
        for name, info in sorted(catalogue.items())
    }
    base = None if frozen is None else {"folder": frozen.folder, "fingerprint": frozen.fingerprint}
    return encode({"tensors": tensors, "frozen": base}, where=TENSORS)


def decode_tensors(data: bytes, *, where: str) -> tuple[dict[str, TensorInfo], FrozenBase | None]:
    value = decode(data, where=where)
    try:
        catalogue = {
            name: TensorInfo(
                tuple(int(size) for size in entry["shape"]),
                None if entry["experts"] is None else tuple(int(expert) for expert in entry["experts"]),
                tuple(str(kind) for kind in entry["kinds"]),
            )
            for name, entry in value["tensors"].items()
        }
        frozen = value["frozen"]
        base = None if frozen is None else FrozenBase(str(frozen["folder"]), str(frozen["fingerprint"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a table of tensors ({type(error).__name__}: {error})") from None
    for name, info in catalogue.items():
        ids = info.expert_ids
        if min(info.shape, default=0) < 0 or len(set(ids)) != len(ids):
            raise CheckpointError(f"{where}: {name} has the shape {info.shape} and the experts {info.experts}")
    return catalogue, base


def encode_manifest(manifest: Manifest) -> bytes:
    value: dict[str, Any] = {
        "version": VERSION,
        "step": manifest.step,
        "serial": manifest.serial,
        "world": manifest.world,
        "files": {name: {"size": r.size, "sha256": r.sha256} for name, r in sorted(manifest.files.items())},
    }
    # The manifest vouches for itself too: a flipped byte in it is not blamed on the file it describes.
    return encode({**value, "sha256": _own_sha256(value)}, where=MANIFEST, indent=1)


def _own_sha256(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, checked against its own hash; its files are not looked at."""
    where = f"{folder}/{MANIFEST}"
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder") from None
        raise CheckpointError(f"{where}: missing, so this is not a complete checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror}") from None
    value = decode(data, where=where)
    if value.get("version") not in _READABLE:
        raise CheckpointError(
            f"{where}: checkpoint format {value.get('version')!r}; this version of moe_dist reads 1 to {VERSION}"
        )
    if value.pop("sha256", None) != _own_sha256(value):
        raise CheckpointError(f"{where}: damaged, its own sha256 differs")
    try:
        files = {
            check_plain_name(name, where=where): FileRecord(int(record["size"]), str(record["sha256"]))
            for name, record in value["files"].items()
        }
        return Manifest(int(value["step"]), int(value["serial"]), int(value["world"]), files)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: not a manifest ({type(error).__name__}: {error})") from None


def file_problem(folder: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with a file as far as its name and size tell, None if nothing."""
    path = folder / name
    if not path.is_file():
        return "missing"
    if path.resolve().parent != folder.resolve():
        return "a link that leads out of the checkpoint, refused"
    size = path.stat().st_size
    return None if size == record.size else f"{size:,} bytes instead of {record.size:,}"


def check_sizes(folder: Path) -> Manifest:
    """The manifest of a folder whose files are all there at full size, or an error that names each that is not."""
    manifest = read_manifest(folder)
    problems = [(name, file_problem(folder, name, record)) for name, record in manifest.files.items()]
    broken = [f"{name}: {problem}" for name, problem in problems if problem]
    if broken:
        raise CheckpointError(f"{folder}: " + "; ".join(broken))
    return manifest


def read_json(folder: Path, manifest: Manifest, name: str) -> bytes:
    """A small file of a checkpoint, checked against the manifest: JSON that was changed is never acted on."""
    where = f"{folder}/{name}"
    if name not in manifest.files:
        raise CheckpointError(f"{where}: not in the manifest")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
        raise CheckpointError(f"{where}: its content is not what was saved (sha256 differs)")
    return data
