"""Runs as processes of their own, as a launcher starts them: to be signalled, killed and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.pool import free_port

REPOSITORY = Path(__file__).parents[2]
WORKER = ("-m", "moe_dist")


def environment(**more: str) -> dict[str, str]:
    """What a process needs of ours; nothing that says which rank the test itself is."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MOE_DIST_DEVICE": "cpu"}
    return {**kept, **own, **more}


def torchrun(world: int, *words: str, cwd: Path, **more: str) -> subprocess.Popen:
    """`torchrun -m moe_dist WORDS`: the launcher's process."""
    launch = ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={world}"]
    launch += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return _start([sys.executable, *launch, *WORKER, *words], cwd, environment(**more))


def bare_ranks(world: int, *words: str, cwd: Path) -> list[subprocess.Popen]:
    """`python -m moe_dist WORDS` once for each rank, with nothing that watches over them."""
    port = str(free_port())
    return [
        _start(
            [sys.executable, *WORKER, *words],
            cwd,
            environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
        )
        for rank in range(world)
    ]


def _start(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.Popen:
    with open(cwd / "output.txt", "ab") as output:
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT)


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id of the ranks that a launcher has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue  # it has just ended
        rank = next((int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")), None)
        if parent == launcher.pid and rank is not None:
            found[rank] = int(folder.name)
    return found


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen], *, seconds: float) -> None:
    """Return once metrics.jsonl tells of that training step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(number >= step for number in trained_steps(run)):
            return
        ended = [process.returncode for process in processes if process.poll() is not None]
        assert not ended, f"ended with {ended} before step {step}"
        time.sleep(0.02)
    raise AssertionError(f"no step {step} after {seconds} s")


def trained_steps(run: Path) -> list[int]:
    """The steps of metrics.jsonl, in order; a line that is just being written is left out."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    entries = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [entry["step"] for entry in entries if entry["event"] == "train"]


def end(processes: list[subprocess.Popen]) -> None:
    """Leave no process behind, whatever has failed."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def write_config(tree: dict, file: Path) -> Path:
    """JSON is YAML."""
    file.write_text(json.dumps(tree))
    return file
