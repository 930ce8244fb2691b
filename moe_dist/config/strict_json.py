"""JSON files that people hand around: read strictly, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_dist.errors import UserError


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; UserError for anything else, also for a key that stands twice and for NaN."""
    text = read_text(path)
    try:
        tree = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also what the two hooks raise
        raise UserError(f"{path}: no valid JSON: {error}") from None
    return as_mapping(tree, str(path))


def write_json(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write one line of JSON by way of a temporary file: the old content stays until the new one is whole."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(tree, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, IsADirectoryError):
            raise UserError(f"{path}: is a folder; give the name of a file") from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file; UserError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return tree


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def as_mapping(value: Any, place: str) -> dict[str, Any]:
    """`value` if it is an object of JSON; UserError naming the place otherwise."""
    if not isinstance(value, dict):
        raise UserError(f"{place}: {short(value)} has to be an object, {{...}}")
    return value


def short(value: Any) -> str:
    """A JSON value as text for a message, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
