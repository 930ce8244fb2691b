"""Builds csrc/ into moe_dist/ops/_native.abi3.so: C++ always, CUDA where nvcc is.

The library is optional. Where the build fails the package installs without it and runs on plain torch; a note beside
the library says in one line what was built, or why not (`moe-dist doctor` prints it).

MOE_DIST_CUDA=auto (default: CUDA if nvcc is found and works) | 0 (never) | 1 (CUDA or the installation fails).
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
NAME = "moe_dist.ops._native"
NOTE = "_native_build.txt"
CUDA_ARCHITECTURES = ("80", "90", "100")
# One library for torch 2.11 and later and Python 3.10 and later: only torch's stable ABI is used.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
FLAGS = ["-O3", "-std=c++17", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
# gcc's own AVX-512 header sets this off
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]


def native_extension():
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    depends = [str(path) for pattern in ("*.h", "*.cu") for path in sorted(SOURCES.glob(pattern))]
    return Extension(NAME, sources, depends=depends, language="c++", py_limited_api=True)


class NativeBuild(build_ext):
    def run(self):
        library = Path(self.get_ext_fullpath(NAME))
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            note = self._build()
        except CudaRequired:
            raise
        except Exception as error:  # whatever is missing here, plain torch is there
            library.unlink(missing_ok=True)
            note = f"no native kernels: {_first_line(error)}"
        library.with_name(NOTE).write_text(note + "\n")
        print(f"moe_dist: {note}", flush=True)

    def _build(self):
        wish = os.environ.get("MOE_DIST_CUDA", "auto")
        if wish not in ("auto", "0", "1"):
            raise CudaRequired(f"MOE_DIST_CUDA must be auto, 0 or 1, not {wish!r}")
        from torch.utils.cpp_extension import include_paths, library_paths

        (extension,) = self.extensions
        extension.include_dirs = include_paths()
        extension.library_dirs = library_paths()
        extension.extra_compile_args = FLAGS + DEFINES
        # libtorch stands for whichever of its parts this torch has: a linker must not drop it as unused
        extension.extra_link_args = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        cuda = self._compile_cuda(extension, wish)
        super().run()
        return f"built C++ kernels; {cuda}"

    def _compile_cuda(self, extension, wish):
        """Compile the .cu files and add them to the extension -> what came of it."""
        if wish == "0":
            return "no CUDA kernels: MOE_DIST_CUDA=0"
        try:
            nvcc = _find_nvcc()
            architectures = _architectures(nvcc)
            folder = Path(self.build_temp)
            folder.mkdir(parents=True, exist_ok=True)
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
            # and PTX of the last, for devices that come after it
            codes.append("-gencode=arch=compute_{0},code=compute_{0}".format(architectures[-1]))
            flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            targets = {path: str(folder / f"{path.stem}.o") for path in sorted(SOURCES.glob("*.cu"))}
            commands = [[nvcc, *flags, *codes, "-c", str(path), "-o", target] for path, target in targets.items()]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run, commands))
        except Exception as error:
            if wish == "1":
                raise CudaRequired(f"MOE_DIST_CUDA=1, but {_first_line(error)}") from error
            return f"no CUDA kernels: {_first_line(error)}"
        extension.extra_objects = list(targets.values())
        extension.extra_compile_args = [*extension.extra_compile_args, "-DMOE_DIST_CUDA"]
        extension.library_dirs = [*extension.library_dirs, *_library_dirs(nvcc)]
        extension.libraries = ["cudart_static", "dl", "rt", "pthread"]
        return "CUDA kernels for " + ", ".join(f"sm_{a}" for a in architectures)


class CudaRequired(Exception):
    """The one failure that stops the installation: CUDA was demanded."""


def _find_nvcc():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    for nvcc in candidates:
        if nvcc.is_file():
            return str(nvcc)
    raise FileNotFoundError("nvcc was not found")


def _library_dirs(nvcc):
    """Where nvcc itself links the CUDA runtime from, whatever the layout of its installation."""
    done = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    return list(dict.fromkeys(re.findall(r'-L"?([^"\s]+)', done.stdout + done.stderr)))


def _architectures(nvcc):
    known = set(re.findall(r"compute_(\d+)\b", _run([nvcc, "--list-gpu-arch"])))
    chosen = [a for a in CUDA_ARCHITECTURES if a in known]
    if not chosen:
        raise RuntimeError(f"{nvcc} knows none of sm_" + ", sm_".join(CUDA_ARCHITECTURES))
    return chosen


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        output = (done.stderr or done.stdout).strip()
        print(output, flush=True)
        lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines() or [""]
        raise RuntimeError(f"{Path(command[0]).name} failed: {lines[0]}")
    return done.stdout


def _first_line(error):
    """What went wrong, in a line: of a compiler that failed its name is enough, its output is in the build log."""
    text = str(error).strip() or type(error).__name__
    command = re.match(r"Command '\['([^']+)'.* (returned .*)", text)
    return f"{command[1]} {command[2]} (pip install -v shows its output)" if command else text.splitlines()[0]
