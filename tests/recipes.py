"""Running a recipe as a user would, without a network; and dying at the worst moment of a stage."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from moe_dist.config.recipe import load_recipe
from moe_dist.launch import stages
from tests.pool import PRELOAD, free_port

ROOT = Path(__file__).parents[1]

# A process with this as its sitecustomize dies as soon as a folder of one of these names is there.
DEADLY = """
import os, signal
from pathlib import Path
rename = os.rename
def rename_and_die(old, new, **options):
    rename(old, new, **options)
    if Path(new).name in os.environ.get("DIE_AT", "").split():
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename_and_die
"""


def run_recipe(recipe: Path, *, die_at: list[str] | None = None) -> str:
    """What `moe-dist run` printed, every stage in a process of its own; it must have ended well.

    die_at: folders whose stages are killed as soon as they are there. The same command is then given again.
    """
    (recipe.parent / "sitecustomize.py").write_text(DEADLY)
    env = {
        "PYTHONPATH": f"{recipe.parent}:{ROOT}",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": str(recipe.parent),
        "DIE_AT": " ".join(die_at or []),
    }
    said = ""
    for _ in range(1 + len(die_at or [])):
        done = subprocess.run(
            [sys.executable, "-m", "moe_dist", "run", str(recipe)],
            capture_output=True, text=True, timeout=900, cwd=recipe.parent, env=env,
        )  # fmt: skip
        said += done.stdout
        if done.returncode != 137:
            break
    assert done.returncode == 0, said[-3000:] + done.stderr[-3000:]
    return said


def run_recipe_warm(recipe: Path, monkeypatch, *, die_at: list[str] | None = None) -> str:
    """The same in a fraction of the time: ranks are forked from a process that has imported the slow packages.

    All else is real, but for the launcher: its ranks are started here.
    """
    log = recipe.with_suffix(".log")
    with monkeypatch.context() as patch:
        for name, value in (("HF_HUB_OFFLINE", "1"), ("HOME", str(recipe.parent)), ("DIE_AT", " ".join(die_at or []))):
            patch.setenv(name, value)
        patch.setattr(stages, "subprocess", SimpleNamespace(Popen=lambda words, **given: _Warm(words, log, **given)))
        lines: list[str] = []
        for _ in range(1 + len(die_at or [])):
            code = stages.run_recipe(load_recipe(recipe), resume="auto", overwrite=False, report=lines.append)
            if code != 137:
                break
    said = "\n".join(lines) + "\n" + (log.read_text() if log.exists() else "")
    assert code == 0, said[-5000:]
    return said


class _Warm:
    """What `_run` asks of subprocess.Popen, for the command lines that `moe_dist.launch.stages.command` makes."""

    def __init__(self, words: list[str], log: Path, *, env: dict[str, str], start_new_session: bool):
        self.pid = os.getpid()
        if "moe_dist" not in words:  # a script, which may want a process without this package
            with open(log, "a") as output:
                self._processes = [subprocess.Popen(words, env=env, stdout=output, stderr=output)]
            return
        ranks = int(words[words.index("--num_gpus") + 1]) if "--num_gpus" in words else 1
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        port, words = free_port(), words[words.index("moe_dist") + 1 :]
        self._processes = [
            context.Process(target=_rank, args=(rank, ranks, port, words, env, str(log)), daemon=True)
            for rank in range(ranks)
        ]
        for process in self._processes:
            process.start()

    def wait(self) -> int:
        codes = []
        for process in self._processes:
            if isinstance(process, subprocess.Popen):
                codes.append(process.wait())
            else:
                process.join()
                codes.append(process.exitcode)
        return next((code for code in codes if code), 0)


def _rank(rank: int, ranks: int, port: int, words: list[str], env: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ |= {**env, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    import torch

    from moe_dist.cli.main import main

    torch.set_num_threads(1)
    exec(DEADLY, {})
    code = main(words)
    sys.stdout.flush()
    sys.exit(code)
