"""The native build: without a compiler the package installs all the same and says so; CUDA can be demanded."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def native_build(monkeypatch):
    """The module csrc/native_build.py."""
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    return importlib.import_module("native_build")


@pytest.fixture
def build(tmp_path):
    """Run the build of setup.py into a folder -> (exit status, output, note left beside the library or None)."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the sources")

    def run(**environment):
        folder = tmp_path / "build"
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}", f"--build-temp={tmp_path}"],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )
        note = folder / "moe_dist" / "ops" / "_native_build.txt"
        return done.returncode, done.stdout, note.read_text().strip() if note.exists() else None

    return run


def test_no_compiler_means_plain_torch_and_one_line(build):
    status, output, note = build(CC="no-such-compiler", CXX="no-such-compiler", MOE_DIST_CUDA="0")
    assert status == 0, output
    assert note.startswith("no native kernels: ")
    assert "no-such-compiler" in note
    assert len(note.splitlines()) == 1
    assert len(note) < 120
    assert output.count("moe_dist: no native kernels") == 1


def test_a_wrong_wish_for_cuda_stops_the_installation(build):
    status, output, note = build(MOE_DIST_CUDA="yes")
    assert status != 0
    assert "MOE_DIST_CUDA must be auto, 0 or 1, not 'yes'" in output
    assert note is None


def test_a_broken_nvcc_leaves_the_cpu_kernels_unless_cuda_is_demanded(native_build, tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho no licence today: error >&2\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    command, extension = native_build.NativeBuild(setuptools.Distribution()), native_build.native_extension()
    command.build_temp = str(tmp_path)
    assert command._compile_cuda(extension, "auto") == "no CUDA kernels: nvcc failed: no licence today: error"
    assert extension.extra_objects == []
    with pytest.raises(native_build.CudaRequired, match="MOE_DIST_CUDA=1, but nvcc failed: no licence today"):
        command._compile_cuda(extension, "1")


def test_a_failed_compiler_is_named_in_a_line(native_build):
    error = RuntimeError("Command '['g++', '-O3', '-c', 'x.cpp']' returned non-zero exit status 1.\nmore")
    line = native_build._first_line(error)
    assert line == "g++ returned non-zero exit status 1. (pip install -v shows its output)"
