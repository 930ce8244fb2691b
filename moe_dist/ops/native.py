"""The native library: finding it, loading it once, saying what runs.

The library is built at install time (setup.py). Without it, or with MOE_DIST_NATIVE=0 in the environment, everything
runs by the plain torch reference.
"""

import functools
import os
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
BUILD_NOTE = _FOLDER / "_native_build.txt"  # one line that setup.py leaves: what was built, or why not


@functools.cache
def _load() -> tuple[bool, str]:
    """Load the library once -> (loaded, why not)."""
    if os.environ.get("MOE_DIST_NATIVE", "1") == "0":
        return False, "switched off by MOE_DIST_NATIVE=0"
    libraries = sorted(_FOLDER.glob("_native*.so"))
    if not libraries:
        note = BUILD_NOTE.read_text().strip() if BUILD_NOTE.exists() else "the package was not built here"
        return False, note
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        cause = error.__cause__ or error  # torch wraps what the loader said
        return False, f"{libraries[0].name} does not load: {str(cause).splitlines()[0]}"
    return True, ""


def has_cpu() -> bool:
    """Whether the C++ kernels run here."""
    return _load()[0]


@functools.cache
def has_cuda() -> bool:
    """Whether the CUDA kernels were built and there is a device for them."""
    return has_cpu() and torch.ops.moe_dist.has_cuda() and torch.cuda.is_available()


def status() -> str:
    """One line: which kernels run and, where they do not, why."""
    loaded, why = _load()
    if not loaded:
        return f"plain torch for CPU and CUDA ({why})"
    cpu = f"C++ kernels ({torch.ops.moe_dist.instruction_set()})"
    if has_cuda():
        return f"{cpu} on the CPU, CUDA kernels on the GPU"
    if torch.ops.moe_dist.has_cuda():
        return f"{cpu} on the CPU; CUDA kernels are built, no GPU is visible"
    note = BUILD_NOTE.read_text().strip() if BUILD_NOTE.exists() else "built without CUDA"
    return f"{cpu} on the CPU, plain torch on CUDA ({note})"
