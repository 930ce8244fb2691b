"""Random kills in a row over a small run on two ranks: `make soak`, or `KILLS=10 make soak` for a short one.

Each start forks the ranks from a process that has torch and DeepSpeed loaded; from there on it is `moe-dist train` with
the environment that a launcher would give. SIGKILL hits a random rank at a random time: while it starts, steps, saves,
evaluates. The same command then goes on. A run that reaches its end is compared with one that nobody disturbed, and the
next begins in a new folder, saving at once and in the background by turns, until the kills are used up.

After each kill: the other rank ends by itself (while ranks still look for each other it cannot know; it is then ended
after a while, as a launcher does), no whole checkpoint is lost or damaged, and the newest is not older than before.
SEED=n draws other times.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from moe_dist import checkpoint
from moe_dist.errors import EXIT_OK
from tests.pool import PRELOAD, free_port
from tests.run.processes import write_config
from tests.run.runs import assert_same_bits, events, make_files, settings, stored, trainer_state

KILLS, STEPS, EVERY = 100, 60, 1
END_S = 120  # for a run to end, on a machine that may be busy with other work
LEFT_S = 10  # for a rank to end whose peer is gone
WORLD = 2


@dataclass
class Tally:
    """What the kills hit."""

    kills: int = 0
    before_training: int = 0
    in_a_save: int = 0
    ended_by_launcher: int = 0
    runs: int = 0
    seconds_to_end: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills over {self.runs} runs of {STEPS} steps: {self.before_training} before the first step "
            f"of a start, {self.in_a_save} with a save under way; the other rank ended by itself after at most "
            f"{max(self.seconds_to_end, default=0):.1f} s, and {self.ended_by_launcher} times it was ended"
        )


def rank_main(rank: int, port: int, config: str, log: str) -> None:
    """What a launcher starts, in a forked process."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "MOE_DIST_DEVICE": "cpu"}
    import torch

    from moe_dist.cli.main import main

    torch.set_num_threads(1)
    sys.exit(main(["train", config]))


class Soak:
    """Starts, kills and checks. `files`: a folder with text and model; everything is written there."""

    def __init__(self, files: Path, *, seed: int = 0):
        self.files, self.tally, self.chance = files, Tally(), random.Random(seed)
        os.environ["OMP_NUM_THREADS"] = "1"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.whole, self.seconds = self._undisturbed()

    def run(self, kills: int) -> Tally:
        while self.tally.kills < kills:
            self._one_run(kills)
        return self.tally

    def _undisturbed(self) -> tuple[Path, float]:
        for name in ("first", "undisturbed"):  # the first builds the data and waits for the slow imports
            run, config = self._prepare(name, background=False)
            started = time.monotonic()
            self._finish(self._start(run, config), run)
            seconds = time.monotonic() - started
        return run, seconds

    def _one_run(self, kills: int) -> None:
        number = self.tally.runs
        run, config = self._prepare(f"run{number}", background=number % 2 == 1)
        self.tally.runs += 1
        while self.tally.kills < kills:
            processes = self._start(run, config)
            if not self._kill_one(processes, run):
                break
        self._finish(self._start(run, config), run)
        assert_same_bits(stored(run, STEPS), stored(self.whole, STEPS))
        assert trainer_state(run, STEPS) == trainer_state(self.whole, STEPS)
        assert events(run, "train", "eval") == events(self.whole, "train", "eval")

    def _kill_one(self, processes: list, run: Path) -> bool:
        """Whether the run was killed before its end."""
        root = run / "checkpoints"
        before, started = newest(root), time.time()
        time.sleep(self.chance.uniform(0, self.seconds / 2))
        victim = self.chance.randrange(WORLD)
        if any(process.exitcode is not None for process in processes):
            assert [process.exitcode for process in self._ended(processes)] == [EXIT_OK] * WORLD, self._said(run)
            return False
        os.kill(processes[victim].pid, signal.SIGKILL)
        killed = time.monotonic()
        codes = [process.exitcode for process in self._ended(processes, seconds=LEFT_S)]
        if codes[victim] == EXIT_OK:
            return False  # the signal came after its end
        assert codes[victim] == -signal.SIGKILL, codes
        self.tally.kills += 1
        self.tally.in_a_save += any("." in path.name for path in root.iterdir()) if root.exists() else 0
        trained = last_step_at(run) > started
        self.tally.before_training += not trained
        if codes[1 - victim] == -signal.SIGKILL:
            assert not trained, f"rank {1 - victim} hangs\n{self._said(run)}"
            self.tally.ended_by_launcher += 1
        else:
            self.tally.seconds_to_end.append(time.monotonic() - killed)
        after = newest(root)
        assert after >= before, f"step {before} was lost, {after} is the newest"
        whole = [entry for entry in checkpoint.ls(root) if entry.problem is None] if root.exists() else []
        for entry in whole:
            checkpoint.verify(root / entry.name).raise_if_bad()
        return True

    def _finish(self, processes: list, run: Path) -> None:
        codes = [process.exitcode for process in self._ended(processes)]
        assert codes == [EXIT_OK] * WORLD, f"{codes}\n{self._said(run)}"

    def _prepare(self, name: str, *, background: bool) -> tuple[Path, Path]:
        run = self.files / name
        tree = settings(
            self.files,
            run,
            "qwen3_moe",
            data={"eval": {"held": {"path": str(self.files / "text.jsonl"), "limit": 4}}},
            parallel={"expert": WORLD, "zero_stage": 1},
            train={"steps": STEPS, "precision": "bf16", "eval_every": 15},
            checkpoint={"every": EVERY, "keep": 2, "background": background},
        )
        return run, write_config(tree, self.files / f"{name}.yaml")

    def _start(self, run: Path, config: Path) -> list:
        port = free_port()
        log = str(self.files / f"{run.name}.log")
        processes = [
            self.context.Process(target=rank_main, args=(rank, port, str(config), log)) for rank in range(WORLD)
        ]
        for process in processes:
            process.start()
        return processes

    def _ended(self, processes: list, *, seconds: float = END_S) -> list:
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            if process.exitcode is None:
                process.kill()
                process.join()
        return processes

    def _said(self, run: Path) -> str:
        return (self.files / f"{run.name}.log").read_text()[-4000:]


def newest(root: Path) -> int:
    """The step that a start would go on from; -1 for none."""
    if not root.is_dir():
        return -1
    path = checkpoint.find_latest(root).path
    return -1 if path is None else int(path.name[5:])


def last_step_at(run: Path) -> float:
    """The clock's time at the last training step that a run has told of."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((line["time"] for line in whole if line["event"] == "train"), default=0.0)


def main() -> None:
    kills, seed = int(os.environ.get("KILLS", KILLS)), int(os.environ.get("SEED", "0"))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(make_files(Path(folder), "qwen3_moe"), seed=seed)
        print(f"undisturbed: {soak.seconds:.1f} s", flush=True)
        print(soak.run(kills))
    print(json.dumps({"seed": seed, "kills": soak.tally.kills, "minutes": round((time.monotonic() - started) / 60, 1)}))


if __name__ == "__main__":
    main()
