"""Work on several gloo ranks of one thread each, and what rank 0 has to say about it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from benchmarks._harness import Missed


def on_ranks(world: int, work: Callable[..., Iterator], *args) -> Iterator:
    """What `work(*args)` yields on rank 0, as it comes. Every rank of a new process group runs it to its end.

    `work` is a generator function of a module; arguments and what it yields must be picklable. Raises `Missed` where
    `work` does on rank 0, and where a rank ends otherwise than it should.
    """
    context = torch.multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    kept = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the ranks when they load torch
    ranks = [context.Process(target=_rank, args=(rank, world, port, send, work, args), daemon=True)
             for rank in range(world)]  # fmt: skip
    for process in ranks:
        process.start()
    if kept is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = kept
    send.close()
    message = ("missed", "the ranks did not come to their end")
    try:
        while (received := receive.recv())[0] == "line":
            yield received[1]
        message = received
    except EOFError:
        pass
    finally:
        for process in ranks:
            if message[0] != "end":  # the others wait for the one that is gone
                process.kill()
            process.join()
    if message[0] == "missed":
        raise Missed(message[1])


def _rank(rank: int, world: int, port: int, lines, work: Callable[..., Iterator], args: tuple) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, world, "127.0.0.1", port)), strict=True))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if rank:
        lines.close()  # so that its end is seen when rank 0 is gone
    try:
        for line in work(*args):
            if rank == 0:
                lines.send(("line", line))
    except Missed as claim:
        if rank == 0:
            lines.send(("missed", str(claim)))
        raise
    dist.barrier()
    if rank == 0:
        lines.send(("end", None))
    dist.destroy_process_group()
