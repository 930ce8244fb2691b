"""Programs that a model has written, run in a process that is locked down: they pass, or say why not.

A program passes if it runs to its end without an exception. It runs as one process without threads, in an empty folder
that is deleted afterwards, with an empty environment and no input, under limits of time, memory and file size; it may
read Python's own files only, write in its folder only, and has no network. On Linux with Landlock and on x86_64 or
aarch64 the kernel sees to that; elsewhere an audit hook of Python's does, which a program that means harm gets around.

What this does not protect against: faults of the kernel itself; a program that fills the disk with many files, each of
them small, until its time is up; a program that guesses what is measured and forges its own passing. Who checks
programs of a model that may be hostile uses a virtual machine besides.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SANDBOX = Path(__file__).parent / "sandbox"
KEPT = 4000  # characters of output
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/etc/localtime")


@dataclass(frozen=True)
class Limits:
    """cpu_seconds bounds work, wall_seconds sleep: it is larger, so that a busy machine does not change verdicts."""

    cpu_seconds: int = 5
    wall_seconds: float = 30.0
    memory_mb: int = 512
    file_mb: int = 1  # of one file, and of all that is printed


@dataclass(frozen=True)
class Verdict:
    """status: passed, failed (an exception, or ended early), timeout, killed (by a signal). detail: in one line."""

    status: str
    detail: str
    output: str

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_program(source: str, *, limits: Limits | None = None) -> Verdict:
    """Run the text of a Python program, locked down. Never raises for what the program does."""
    return _run(source, limits or Limits())[0]


def run_programs(sources: Iterable[str], *, workers: int, limits: Limits | None = None) -> Iterator[Verdict]:
    """`run_program` of each, `workers` at a time, in the order of `sources`."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        yield from pool.map(lambda source: run_program(source, limits=limits), sources)


@lru_cache(maxsize=1)
def protection() -> tuple[str, ...]:
    """What is in force on this machine: limits, then landlock and seccomp, or audit hook where one is missing."""
    return tuple(_run("", Limits())[1])


def _run(source: str, limits: Limits, *, kernel: bool = True) -> tuple[Verdict, list[str]]:
    folder = tempfile.mkdtemp(prefix="moe-dist-program-")
    token = secrets.token_hex(16)
    reading, writing = os.pipe()
    try:
        with tempfile.TemporaryFile() as output:
            job = {
                "source": source,
                "pipe": writing,
                "token": token,
                "readable": _readable(),
                "cpu_seconds": limits.cpu_seconds,
                "memory_bytes": limits.memory_mb << 20,
                "file_bytes": limits.file_mb << 20,
                "kernel": kernel,
            }
            code = _wait(json.dumps(job).encode(), folder, output, writing, limits.wall_seconds)
            os.set_blocking(reading, False)
            try:
                said = os.read(reading, 65536).decode(errors="replace")
            except BlockingIOError:
                said = ""
            output.seek(0)
            printed = output.read(limits.file_mb << 20).decode(errors="replace")
    finally:
        os.close(reading)
        os.close(writing)
        _remove(folder)
    first, _, rest = said.partition("\n")
    if not first:  # it did not come to the program: that is our fault, or the machine's
        if code is None:
            return Verdict("timeout", f"not started within {limits.wall_seconds:g} s", ""), []
        raise RuntimeError(f"the process for programs failed to lock itself down (exit code {code}):\n{printed}")
    return _judge(code, rest == token, printed, limits), json.loads(first)


def _judge(code: int | None, reached_end: bool, printed: str, limits: Limits) -> Verdict:
    shown = printed if len(printed) <= KEPT else f"{printed[: KEPT // 2]}\n[...]\n{printed[-KEPT // 2 :]}"
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")[:300]
    if code is None:
        return Verdict("timeout", f"not done after {limits.wall_seconds:g} s", shown)
    if code == -signal.SIGXCPU:
        return Verdict("timeout", f"more than {limits.cpu_seconds} s of computing", shown)
    if code == -signal.SIGKILL:  # follows where SIGXCPU is ignored
        detail = f"by the system: more than {limits.cpu_seconds} s of computing, or no memory left on the machine"
        return Verdict("killed", detail, shown)
    if code < 0:
        return Verdict("killed", f"by signal {-code}", shown)
    if code == 0 and reached_end:
        return Verdict("passed", "", shown)
    if len(printed) >= limits.file_mb << 20:
        return Verdict("failed", f"printed more than {limits.file_mb} MB", shown)
    return Verdict("failed", last or f"ended early with exit code {code}", shown)


def _wait(job: bytes, folder: str, output, pipe: int, seconds: float) -> int | None:
    """Exit code of the locked process, negative for a signal; None if its time ran out."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(SANDBOX)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        cwd=folder,
        env={"LANG": "C.UTF-8", "HOME": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        pass_fds=[pipe],
        start_new_session=True,
    )
    try:
        process.communicate(job, timeout=seconds)
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone, and had no others beside it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin:
            process.stdin.close()


@lru_cache(maxsize=1)
def _readable() -> list[str]:
    """What a Python process reads: its installation, the environment that it belongs to, and system libraries."""
    places = [sys.base_prefix, sys.prefix, *(path for path in sys.path if "-packages" in path), *SYSTEM, *DEVICES]
    return [place for place in dict.fromkeys(map(os.path.realpath, places)) if place != "/" and os.path.exists(place)]


def _remove(folder: str) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:  # folders in folders in folders
        subprocess.run(["rm", "-rf", "--", folder], check=False, capture_output=True)
