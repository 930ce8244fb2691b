"""What the GPU suite does before it measures: which versions there are, the GPU tests, the sanitizer."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks._harness import device
from moe_dist.ops import native, passes

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "triton", "deepspeed")


def about() -> dict[str, str]:
    """Device, versions and which kernels run, by name."""
    found = {"device": device(), "kernels": native.status(), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["CUDA"] = f"{torch.version.cuda}, sm_{properties.major}{properties.minor}"
        found["memory"] = f"{properties.total_memory >> 30} GiB, L2 {properties.L2_cache_size >> 20} MiB"
        if passes.backend("cuda") != "cuda":
            found["kernels"] += " — NOT OURS: the figures below are those of plain torch"
    return found


def build(seconds: float) -> str:
    """One line: whether the CUDA kernels are there, or how building them in place ended. Before anything loads them."""
    if not torch.cuda.is_available():
        return "nothing to build: no GPU"
    ask = "from moe_dist.ops import native; raise SystemExit(0 if native.has_cuda() else 3)"
    if subprocess.run([sys.executable, "-c", ask], cwd=ROOT).returncode == 0:
        return "the CUDA kernels are there"
    return _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], seconds, MOE_DIST_CUDA="1")


def gpu_tests(seconds: float) -> str:
    """One line: how `pytest tests/gpu` ended."""
    if not (ROOT / "tests" / "gpu").is_dir():
        return "no tests/gpu here"
    return _run([sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"], seconds)


def sanitizer(seconds: float) -> dict[str, str]:
    """Tool -> one line: how each kernel fared under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or next(
        (str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if tool is None or not torch.cuda.is_available():
        return {"compute-sanitizer": "not installed" if tool is None else "no GPU"}
    found = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "benchmarks._gpu_sanitize"]
        # Without torch's own cache each tensor is an allocation, whose end the tool knows.
        found[check] = _run(command, seconds / 2, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return found


def _run(command: list[str], seconds: float, **environment: str) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {seconds:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [""]
    if done.returncode:
        print(done.stdout[-6000:], flush=True)
    return lines[-1].strip("= ") + (f" (exit status {done.returncode})" if done.returncode else "")
