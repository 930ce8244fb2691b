"""Programs that pass, that fail, and that mean harm, in the locked-down process."""

from __future__ import annotations

import os
import socket
import time

import pytest

from moe_dist.methods.self_moe.judging.checker import Limits, _run, protection, run_program, run_programs

LIMITS = Limits(cpu_seconds=1, wall_seconds=20)
KERNEL = protection() == ("limits", "landlock", "seccomp")
needs_kernel = pytest.mark.skipif(not KERNEL, reason=f"this kernel has no Landlock or no seccomp: {protection()}")


def test_passes_at_its_end_only():
    assert run_program("assert 1 + 1 == 2").passed
    assert run_program("print('x')").output == "x\n"
    assert run_program("import numpy; assert numpy.eye(2).sum() == 2").passed
    wrong = run_program("print('so far')\nassert 1 + 1 == 3, 'wrong sum'")
    assert (wrong.status, wrong.detail) == ("failed", "AssertionError: wrong sum")
    assert wrong.output.startswith("so far\n")
    assert run_program("def f(:").detail == "SyntaxError: invalid syntax"


@pytest.mark.parametrize("early", ["import sys; sys.exit(0)", "raise SystemExit", "import os; os._exit(0)", "exit()"])
def test_an_early_end_is_no_pass(early):
    assert run_program(f"{early}\nassert False").status == "failed"


def test_program_alone_with_itself():
    verdict = run_program(
        "import os, sys\n"
        "assert os.listdir('.') == [] and input is not None\n"
        "assert sys.stdin.read() == ''\n"
        "assert not {'PATH', 'OPENAI_API_KEY', 'PYTHONPATH'} & set(os.environ)\n"
        "open('mine', 'w').write('a'); os.mkdir('folder'); os.rename('mine', 'folder/mine')\n"
        "assert open('folder/mine').read() == 'a'\n"
        "print(os.getcwd())"
    )
    assert verdict.passed, verdict
    assert not os.path.exists(verdict.output.strip())


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernel), False])
class TestHarm:
    """With the kernel's protection, and with the audit hook that stands in where there is none."""

    def run(self, source: str, kernel: bool, limits: Limits = LIMITS):
        start = time.monotonic()
        verdict, in_force = _run(source, limits, kernel=kernel)
        assert in_force == (["limits", "landlock", "seccomp"] if kernel else ["limits", "audit hook"])
        assert time.monotonic() - start < limits.wall_seconds + 5
        return verdict

    def test_endless_loop(self, kernel):
        verdict = self.run("while True: pass", kernel)
        assert (verdict.status, verdict.detail) == ("timeout", "more than 1 s of computing")

    def test_deaf_endless_loop(self, kernel):
        source = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
        assert self.run(source, kernel).status == "killed"

    def test_sleep(self, kernel):
        verdict = self.run("import time; time.sleep(60)", kernel, Limits(wall_seconds=1.5))
        assert (verdict.status, verdict.detail) == ("timeout", "not done after 1.5 s")

    def test_memory_hog(self, kernel):
        verdict = self.run("x = []\nwhile True: x.append(bytearray(1 << 24))", kernel)
        assert verdict.detail == "MemoryError"

    def test_fork_bomb(self, kernel):
        verdict = self.run("import os\nwhile True: os.fork()", kernel)
        assert verdict.detail.startswith("PermissionError")

    def test_other_programs(self, kernel):
        for source in ("import subprocess; subprocess.run(['ls'])", "import os; os.execv('/bin/ls', ['ls'])"):
            assert self.run(source, kernel).detail.startswith("PermissionError")

    def test_signals(self, kernel):
        verdict = self.run("import os; os.kill(os.getppid(), 9)", kernel)
        assert verdict.detail.startswith("PermissionError")

    def test_files_outside(self, kernel, tmp_path):
        victim = tmp_path / "file"
        victim.write_text("before")
        tmp_path.chmod(0o777)
        for source in (
            f"open({str(victim)!r}, 'w')",
            f"open({str(tmp_path / 'new')!r}, 'x')",
            f"import os; os.remove({str(victim)!r})",
            f"import os; os.rename({str(victim)!r}, 'taken')",
            f"import os; os.mkdir({str(tmp_path / 'new')!r})",
            f"import os; os.symlink({str(tmp_path)!r}, 'link'); open('link/new', 'x')",
            f"import os; os.chmod({str(victim)!r}, 0)",
            f"import os; os.truncate({str(victim)!r}, 0)",
        ):
            assert self.run(source, kernel).detail.startswith("PermissionError"), source
        assert victim.read_text() == "before"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_network(self, kernel):
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.1)
            source = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}))"
            assert self.run(source, kernel).detail.startswith("PermissionError")
            with pytest.raises(TimeoutError):
                server.accept()

    def test_huge_output_and_files(self, kernel):
        verdict = self.run("while True: print('x' * 1000)", kernel)
        assert (verdict.status, verdict.detail) == ("failed", "printed more than 1 MB")
        assert len(verdict.output) < 5000
        verdict = self.run("f = open('big', 'wb')\nwhile True: f.write(bytes(100_000))", kernel)
        assert verdict.detail == "OSError: [Errno 27] File too large"

    def test_limits_stay(self, kernel):
        source = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))"
        assert self.run(source, kernel).detail == "ValueError: not allowed to raise maximum limit"

    def test_crash(self, kernel):
        source = "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()"
        assert not self.run(source, kernel).passed


@needs_kernel
@pytest.mark.parametrize(
    "source",
    [
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "import os; os.listdir('/')",
        "import ctypes\nif ctypes.CDLL(None).fork() < 0: raise PermissionError",
        "import ctypes\nif ctypes.CDLL(None).socket(2, 1, 0) < 0: raise PermissionError",
        "import os; os.memfd_create('x')",
    ],
)
def test_kernel_refuses_what_a_hook_cannot(source):
    assert run_program(source).detail.startswith("PermissionError")


def test_deep_folders_are_removed():
    verdict = run_program("import os\nfor _ in range(2000): os.mkdir('d'); os.chdir('d')\nprint(os.getcwd())")
    assert verdict.passed
    assert not os.path.exists(verdict.output.strip().split("/d/")[0])


def test_many_in_order():
    sources = [f"print({n})\nassert {n} % 3" for n in range(6)]
    verdicts = list(run_programs(sources, workers=2))
    assert [verdict.passed for verdict in verdicts] == [False, True, True] * 2
    assert [verdict.output.split()[0] for verdict in verdicts] == list("012345")
