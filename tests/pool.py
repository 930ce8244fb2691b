"""A pool of gloo ranks that stays warm for the whole test run, so that a distributed test costs no torch import.

`RankPool(world).run(fn, *args)` calls the module-level function `fn(*args)` on every rank of a process group of `world`
ranks and returns the results in rank order. A rank that raises, or a call that outlives its timeout, fails the test
with the traceback of the rank that failed first, or with every rank's stack, and the pool is started afresh.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

GRACE = 3.0  # seconds that the other ranks get after one has failed: they may be waiting for it in a collective
START = 300.0  # seconds for the slow imports, once, and for the ranks to meet


STACK = signal.SIGRTMIN  # a training run takes the usual ones for itself
PRELOAD = ["torch", "transformers.modeling_utils", "deepspeed", "moe_dist.train.loop"]


class RankFailure(AssertionError):
    """A rank raised or did not answer in time."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _serve(rank: int, world: int, port: int, pipe, log_path: str) -> None:
    log = open(log_path, "w")  # noqa: SIM115 - lives as long as the process
    faulthandler.enable(log)
    faulthandler.register(STACK, file=log)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pipe.send_bytes(pickle.dumps(("ready", None)))
    while True:
        fn, args = pickle.loads(pipe.recv_bytes())
        try:
            answer = pickle.dumps(("done", fn(*args)))
        except BaseException:
            answer = pickle.dumps(("failed", (time.time(), traceback.format_exc())))
        pipe.send_bytes(answer)


class RankPool:
    """`world` processes in one gloo process group, started at the first call."""

    def __init__(self, world: int):
        self.world = world
        self.processes: list[multiprocessing.Process] = []

    def run(self, fn, *args, timeout: float = 60.0) -> list:
        """Results of `fn(*args)` by rank. `fn` and its arguments and results must be picklable."""
        if not self.processes:
            self._start()
        call = pickle.dumps((fn, args))
        for pipe in self.pipes:
            pipe.send_bytes(call)
        return self._collect(timeout, getattr(fn, "__name__", str(fn)))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes = []

    def _start(self) -> None:
        # The ranks are forked from a process that has imported the slow packages once, for all pools.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.logs = [os.path.join(self.folder.name, f"rank{rank}.log") for rank in range(self.world)]
        port, self.pipes = free_port(), []
        kept = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the children when they load torch
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, port, theirs, self.logs[rank]), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)
        if kept is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = kept
        self._collect(START, "start of the ranks")

    def _collect(self, timeout: float, what: str) -> list:
        results: dict[int, object] = {}
        failures: list[tuple[float, int, str]] = []
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world:
            answered = {*results, *(rank for _, rank, _ in failures)}
            waiting = {self.pipes[rank]: rank for rank in range(self.world) if rank not in answered}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    state, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self.processes[rank].join(1)
                    state, value = (
                        "failed",
                        (time.time(), f"the process died, exit code {self.processes[rank].exitcode}"),
                    )
                if state == "failed":
                    failures.append((value[0], rank, value[1]))
                    deadline = min(deadline, time.monotonic() + GRACE)
                else:
                    results[rank] = value
        if len(results) == self.world:
            return [results[rank] for rank in range(self.world)]
        silent = [r for r in range(self.world) if r not in results and r not in {rank for _, rank, _ in failures}]
        report = self._report(what, timeout, failures, silent)
        self.close()
        raise RankFailure(report)

    def _report(self, what: str, timeout: float, failures: list, silent: list[int]) -> str:
        if failures:
            _, rank, trace = min(failures)
            return f"{what}: rank {rank} of {self.world} failed first:\n{trace}"
        for rank in silent:
            os.kill(self.processes[rank].pid, STACK)
        time.sleep(0.5)
        stacks = []
        for rank in silent:
            known = os.path.exists(self.logs[rank])
            stack = Path(self.logs[rank]).read_text() if known else "its imports: it has no log yet"
            stacks.append(f"--- rank {rank} was at\n{stack}")
        return f"{what}: ranks {silent} of {self.world} did not answer in {timeout} s\n" + "\n".join(stacks)
