"""What a rank tells the others of itself: a dict of plain values."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import socket
import time
from pathlib import Path

import torch

VISIBLE = 30.0  # seconds that a file may take to appear on another host: shared file systems remember what is not there
PROBE = 8 << 20  # bytes of the file, so that writing it tells how fast the disk is


def own_facts(device: torch.device, *, versions: dict[str, str | None], config: dict, of_rank_0: dict) -> dict:
    """The facts of this rank. versions: of the packages that matter. config: nested plain values.

    of_rank_0: what rank 0 has published: its `config`, and `file` and `token` in the run folder that has to be seen.
    """
    seen = wait_for_file(Path(of_rank_0["file"]), of_rank_0["token"])
    return {
        "versions": versions,
        "package": package_hash(),
        "config": differing(of_rank_0["config"], config),
        "sees": seen,
        **facts_of_one(device, Path(of_rank_0["file"])),
        "told": time.time(),  # last: by when it arrives, rank 0 sees how its clock and this one differ
    }


def facts_of_one(device: torch.device, folder: Path) -> dict:
    """What a rank tells of its host alone: name, device, memory, and disk where `folder` is or will be."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return {"host": socket.gethostname(), "disk": shutil.disk_usage(there).free, **_memory(device)}


def write_file(path: Path, token: str) -> float:
    """Write the file that all ranks have to see; bytes a second."""
    start = time.perf_counter()
    with open(path, "wb") as file:
        file.write(bytes(PROBE) + token.encode())
        file.flush()
        os.fsync(file.fileno())
    return PROBE / (time.perf_counter() - start)


def wait_for_file(path: Path, token: str) -> bool:
    """Whether the file is here, and the very same one."""
    end = time.monotonic() + VISIBLE
    while True:
        try:
            with open(path, "rb") as file:
                file.seek(PROBE)
                if file.read() == token.encode():
                    return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.05)


@functools.cache
def package_hash() -> str:
    """sha256 over the Python files of this package, by which a host with another version of it is found without git."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def differing(theirs: dict, ours: dict, place: str = "") -> list[str]:
    """Keys of two nested dicts that differ, with both values: 'train.lr=1e-3 (rank 0: 1e-4)'."""
    lines = []
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        a, b = theirs.get(name), ours.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differing(a, b, f"{place}{name}.")
        elif a != b:
            lines.append(f"{place}{name}={b} (rank 0: {a})")
    return lines


def _memory(device: torch.device) -> dict:
    """free and total bytes of the device that holds the model; of the host, what this container may use."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"device": torch.cuda.get_device_name(device), "free": free, "total": total}
    amounts = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            amounts[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return {"device": "cpu", "free": None, "total": None}
    free, total = amounts.get("MemAvailable"), amounts.get("MemTotal")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free, total = min(free, limit - used), min(total, limit)
    except (OSError, ValueError, TypeError):
        pass  # no limit
    return {"device": "cpu", "free": free, "total": total}
