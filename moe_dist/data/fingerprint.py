"""Digests by which caches are found and resumed runs recognise their data."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from moe_dist.errors import UserError


def digest(value: object) -> str:
    """Hex sha256 of a JSON-able value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_digest(path: Path, memo_dir: Path | None = None) -> str:
    """Hex sha256 of a file's content.

    With `memo_dir` the digest is remembered under the file's absolute path, size and modification time, so that a
    large corpus is hashed once, not at every start.
    """
    path = Path(path)
    memo = None
    try:
        if memo_dir is not None:
            status = path.stat()
            memo = Path(memo_dir) / digest([str(path.resolve()), status.st_size, status.st_mtime_ns])
            if memo.is_file() and len(known := memo.read_text("ascii")) == 64:
                return known
        with open(path, "rb") as file:
            found = _hash_blocks(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if memo is not None:
        _remember(memo, found)
    return found


def _hash_blocks(file) -> str:
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def _remember(memo: Path, text: str) -> None:
    """Write the memo atomically; a memo that cannot be written only costs time at the next start."""
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=memo.parent, prefix=".memo-")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, memo)
    except OSError:
        return
