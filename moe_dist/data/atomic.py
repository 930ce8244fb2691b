"""Folders that exist whole or not at all, built by one of several processes."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_dist.data.made import note_folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an advisory file lock, which the system frees when its process dies.

    Yields False, without waiting, on a file system that has no locks.
    """
    import fcntl

    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held


@contextlib.contextmanager
def new_folder(folder: Path, *, marker: str) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; at a clean end it takes the name `folder`, else it is removed.

    marker: a file that a whole folder holds, written last. If `folder` came to hold one meanwhile, the first one
    stays; a `folder` without it is debris and is replaced.
    """
    folder = Path(folder)
    temporary = folder.parent / f".building-{folder.name}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()  # not mkdtemp, whose folders other users of a shared cache could not read
    try:
        yield temporary
        assert (temporary / marker).is_file()
        sync_folder(temporary)
        note_folder(temporary, folder)
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            if not (folder / marker).is_file():
                shutil.rmtree(folder)
                os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_debris(folder: Path) -> None:
    """Remove what killed builders of `folder` left; only for the holder of its lock."""
    for left in folder.parent.glob(f".building-{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and flush it to disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
