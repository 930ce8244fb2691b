"""One launch, several worlds: its ranks are cut into groups of equal size, and each group becomes a world of its own.

Inside, RANK, WORLD_SIZE and torch's default process group are those of the group alone. So whatever runs there is an
ordinary smaller run: layout, ZeRO, checkpoints and resuming need not know. The groups share nothing but a key-value
store, by which they hear of each other's end: a rank that fails, dies or is asked to stop ends all the others too.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from signal import SIGTERM

import torch
import torch.distributed as dist

from moe_dist.errors import EXIT_TRANSIENT, PeerFailure, UserError
from moe_dist.train.start import form_group, on_rank_zero

LOOK = 1.0  # seconds between two looks at the others
SILENCE = 120.0  # a rank that has shown no sign of life for so long is taken for dead
GRACE = 60.0  # what a rank gets to save and end by itself once another has failed
_STORE_TIMEOUT = timedelta(minutes=5)
_ENDED = "ended"


def group_count(ranks: int, *, most: int, asked: int | None = None) -> int:
    """Into how many groups of equal size `ranks` are cut: `asked`, or as many as fit, at most `most`.

    Raises UserError where that many groups cannot be formed, saying what would work.
    """
    fitting = [count for count in range(1, min(ranks, most) + 1) if ranks % count == 0]
    if asked is None:
        return fitting[-1]
    if asked not in fitting:
        raise UserError(
            f"{ranks} rank(s) cannot be cut into {asked} groups of equal size for {most} expert(s); what works here: "
            f"{', '.join(map(str, fitting))}, or another number of ranks"
        )
    return asked


class Worlds:
    """This rank's view of the groups. index: of its own group; count: of all of them."""

    def __init__(self, index: int, count: int, watch: _Watch | None = None):
        self.index, self.count = index, count
        self._watch = watch

    def at(self, label: str) -> None:
        """Say what this rank is doing, for messages about it; raises PeerFailure where another rank has failed."""
        if self._watch is not None:
            self._watch.label = label
            self._watch.check()

    def stop(self, label: str) -> None:
        """Ask all other groups to stop, as this one has been asked."""
        if self._watch is not None:
            self._watch.end("stopped", label)

    @property
    def stopped(self) -> bool:
        """Whether a rank of any group has been asked to stop."""
        return self._watch is not None and self._watch.news is not None and self._watch.news[0] == "stopped"


@contextmanager
def split(count: int, device: torch.device) -> Iterator[Worlds]:
    """Context in which the launch's ranks are `count` worlds; afterwards they are one again. Collective.

    count: divides the number of ranks. Consecutive ranks form a group, so that it stays inside a node where it fits.
    Leaving waits for all groups. An exception in one group raises PeerFailure in the others, at the next `at` or at the
    end, and ends their processes if they get there in no other way within GRACE seconds.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    assert world % count == 0, f"{world} ranks, {count} groups"
    if count == 1:
        yield Worlds(0, 1)
        return
    size = world // count
    host = os.environ["MASTER_ADDR"]
    # Of our own, not the launcher's: it has to outlive the process group, and the watch needs a connection to itself.
    served = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = on_rank_zero(lambda: served.port)
    store = served or dist.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT)
    watched = dist.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT)
    kept = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE")}
    leave_world()
    os.environ |= {"RANK": str(rank % size), "WORLD_SIZE": str(size)}
    form_group(device, store=dist.PrefixStore(f"group-{rank // size}", store))
    watch = _Watch(watched, rank, world)
    watch.start()
    try:
        yield Worlds(rank // size, count, watch)
        _wait_for_all(store, world, watch)
    except BaseException as error:
        if not isinstance(error, PeerFailure):
            watch.end("failed", f"{watch.label}: {error or type(error).__name__}")
        if rank == 0:
            time.sleep(3 * LOOK)  # the store lives here: let the others hear of it
        raise
    finally:
        watch.close()
        os.environ |= kept
    leave_world()
    form_group(device, store=dist.PrefixStore("whole", store))
    dist.barrier()  # rank 0, where the store lives, may end its process now


def leave_world() -> None:
    """Give up torch's default process group, and what DeepSpeed keeps of it."""
    if not dist.is_initialized():
        return
    if "deepspeed" in sys.modules and sys.modules["deepspeed"].comm.is_initialized():
        sys.modules["deepspeed"].comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def _wait_for_all(store: dist.Store, world: int, watch: _Watch) -> None:
    watch.label = "done"
    store.add("done", 1)
    while store.add("done", 0) < world:
        watch.check()
        time.sleep(LOOK / 5)


class _Watch(threading.Thread):
    """Shows that this rank lives, looks whether its neighbour does, and hears of what has ended elsewhere.

    label: what this rank is at. news: (`failed` or `stopped`, what was said), once there are any.
    """

    def __init__(self, store: dist.Store, rank: int, world: int):
        super().__init__(name="watch", daemon=True)
        self.label, self.news = "start", None
        self._store, self._rank, self._neighbour = store, rank, (rank + 1) % world
        self._over = threading.Event()

    def check(self) -> None:
        """Raises PeerFailure if a rank of this launch has failed."""
        if self.news is not None and self.news[0] == "failed":
            raise PeerFailure(self.news[1])

    def end(self, kind: str, what: str) -> None:
        """Tell all ranks, unless another one has spoken before."""
        try:
            said = self._store.compare_set(_ENDED, "", f"{kind} {what}").decode()
        except RuntimeError:
            said = f"{kind} {what}"  # rank 0, where the store lives, is gone, and the others will notice
        self.news = tuple(said.split(" ", 1))

    def close(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        beats, last, seen_at = 0, "", time.monotonic()
        while not self._over.wait(LOOK):
            beats += 1
            try:
                self._store.set(f"alive-{self._rank}", f"{beats} {self.label}")
                if self._store.check([_ENDED]):
                    self.news = tuple(self._store.get(_ENDED).decode().split(" ", 1))
                    break
                key = f"alive-{self._neighbour}"
                seen = self._store.get(key).decode() if self._store.check([key]) else ""
            except RuntimeError:
                self.news = ("failed", "rank 0 is gone")
                break
            if seen != last:
                last, seen_at = seen, time.monotonic()
            elif time.monotonic() - seen_at > SILENCE:
                at = seen.partition(" ")[2] or "start"
                self.end("failed", f"{at}: rank {self._neighbour} has shown no sign of life for {SILENCE:.0f} s")
                break
        else:
            return
        # A run in training saves and ends at its next step, as when it is asked to from outside; one that is not there
        # yet does not hear it, and is asked again.
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            interrupt_main(SIGTERM)
            if self._over.wait(LOOK):
                return
        if self.news[0] == "failed":
            print(f"moe-dist [rank {self._rank}]: ending, since {self.news[1]}", file=sys.stderr, flush=True)
            os._exit(EXIT_TRANSIENT)
