import subprocess
import sys
from pathlib import Path

from moe_dist.cli.main import main
from moe_dist.errors import EXIT_OK, EXIT_USER
from moe_dist.launch import doctor

REPOSITORY = Path(__file__).parents[2]


def test_a_healthy_machine_exits_with_zero(capsys):
    assert main(["doctor"]) == EXIT_OK
    out = capsys.readouterr().out
    assert "!!" not in out
    for name in ("torch", "kernels", "permute", "backends", "deepspeed", "disk"):
        assert name in out


def test_works_without_deepspeed(monkeypatch):
    def version(name):
        if name == "deepspeed":
            raise doctor.metadata.PackageNotFoundError(name)
        return "99"

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert doctor._deepspeed().state == "note"


def test_wrong_kernels_are_found(monkeypatch, capsys):
    import moe_dist.ops

    right = moe_dist.ops.unpermute
    monkeypatch.setattr(moe_dist.ops, "unpermute", lambda rows, plan, probs: right(rows, plan, probs * 1.001))
    assert main(["doctor"]) == EXIT_USER
    assert "gradient of" in capsys.readouterr().out


def test_a_failing_check_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "_kernels", lambda: 1 / 0)
    found = {finding.name: finding for finding in doctor.examine()}
    assert found["kernels"].state == "bad"
    assert "ZeroDivisionError" in found["kernels"].text


def test_clashing_rank_variables_are_reported():
    done = subprocess.run(
        [sys.executable, "-c", "from moe_dist.launch.doctor import _ranks; print(_ranks().state)"],
        capture_output=True, text=True, cwd=REPOSITORY, env={"WORLD_SIZE": "2", "PATH": ""},
    )  # fmt: skip
    assert done.stdout.strip() == "bad"
