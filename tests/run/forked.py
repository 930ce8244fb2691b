"""Runs whose ranks are forked from a server that has the slow imports behind it: else as `python -m moe_dist` starts
them, each a process of its own that ends as the command line lets it end."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.pool import PRELOAD, free_port


class Ranks:
    """`world` ranks that run `moe-dist WORDS`; rank r calls `before(r, *args)` first. Context that leaves none behind.

    output: the file that gets what all of them print. environment: variables over those that make them ranks.
    """

    def __init__(
        self,
        world: int,
        words: tuple[str, ...],
        output: Path,
        *,
        before: Callable | None = None,
        args=(),
        **environment,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        port, self.output = int(environment.get("MASTER_PORT", free_port())), output
        self.port = port
        self.processes = []
        for rank in range(world):
            own = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            own |= {"OMP_NUM_THREADS": 1, "MOE_DIST_DEVICE": "cpu", "HF_HUB_OFFLINE": 1, **environment}
            process = context.Process(
                target=_run, args=({n: str(v) for n, v in own.items()}, words, str(output), before, args)
            )
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def pid(self, rank: int) -> int:
        return self.processes[rank].pid

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes by rank, negative ones of signals; None for those that have not ended in time."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def _run(environment: dict[str, str], words: tuple[str, ...], output: str, before, args) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    import torch

    torch.set_num_threads(1)
    if before is not None:
        before(int(environment["RANK"]), *args)
    from moe_dist.cli.main import main

    sys.argv = ["moe-dist", *words]
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
