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
from contextlib import contextmanager, suppress
from datetime import timedelta
from signal import SIGTERM

import torch
import torch.distributed as dist

from moe_dist.errors import EXIT_TRANSIENT, PeerFailure, UserError
from moe_dist.train.start import form_group, on_rank_zero
from moe_dist.train.stop import StopFlag

LOOK = 1.0  # seconds between two looks at the others
SILENCE = 120.0  # a rank that has shown no sign of life for so long is taken for dead
GRACE = 60.0  # what a rank gets to save and end by itself once another has failed
_STORE_TIMEOUT = timedelta(minutes=5)
_STOPPED, _FAILED = "stopped", "failed"


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

    def __init__(self, index: int, count: int, flag: StopFlag, watch: _Watch | None = None):
        self.index, self.count = index, count
        self._flag, self._watch = flag, watch
        self._left: bool | None = None

    def at(self, label: str) -> None:
        """Say what this rank is doing, for messages about it; raises PeerFailure where another rank has failed."""
        if self._watch is not None:
            self._watch.label = label
            self._watch.check()

    def stop(self, label: str) -> None:
        """Ask all other groups to stop, as this one has been asked at `label`."""
        if self._watch is not None:
            self._watch.stopped = True
            self._watch.tell(_STOPPED, label)

    @property
    def stopped(self) -> bool:
        """Whether a rank has been asked to stop. Within `split` collective over the group, and it tells the others."""
        if self._left is not None:
            return self._left
        asked = self._any()
        if asked and self._watch is not None:
            self.stop(self._watch.label)
        return asked

    def wait(self, store: dist.Store, world: int) -> None:
        """Wait for the ranks of all groups."""
        self.at("done")
        store.add("done", 1)
        while store.add("done", 0) < world:
            self._watch.check()
            if self._flag.requested:
                self.stop("done")
            time.sleep(LOOK / 5)

    def settle(self) -> None:
        """The last word on `stopped`, the same on all ranks, which are one world again. Collective."""
        self._left = self._any()

    def _any(self) -> bool:
        asked = torch.tensor(int(self._flag.requested or (self._watch is not None and self._watch.stopped)))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)


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
        with StopFlag() as flag:
            yield Worlds(0, 1, flag)
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
        with StopFlag() as flag:
            worlds = Worlds(rank // size, count, flag, watch)
            yield worlds
            worlds.wait(store, world)
    except BaseException as error:
        watch.tell(_FAILED, f"{watch.label}: {error or type(error).__name__}")
        if rank == 0:
            time.sleep(3 * LOOK)  # the store lives here: let the others hear of it
        raise
    finally:
        watch.close()
        os.environ |= kept
    leave_world()
    form_group(device, store=dist.PrefixStore("whole", store))
    worlds.settle()  # also says that rank 0, where the store lives, may end its process now


def leave_world() -> None:
    """Give up torch's default process group, and what DeepSpeed keeps of it."""
    if not dist.is_initialized():
        return
    if "deepspeed" in sys.modules and sys.modules["deepspeed"].comm.is_initialized():
        sys.modules["deepspeed"].comm.destroy_process_group()
    else:
        dist.destroy_process_group()


class _Watch(threading.Thread):
    """Shows that this rank lives, looks whether its neighbour does, and hears of what has happened elsewhere.

    label: what this rank is at. stopped: whether a rank has been asked to stop. failed: what a rank has died of.
    """

    def __init__(self, store: dist.Store, rank: int, world: int):
        super().__init__(name="watch", daemon=True)
        self.label, self.stopped, self.failed = "start", False, ""
        self._store, self._rank, self._neighbour = store, rank, (rank + 1) % world
        self._over = threading.Event()

    def check(self) -> None:
        """Raises PeerFailure if a rank of this launch has failed."""
        if self.failed:
            raise PeerFailure(self.failed)

    def tell(self, key: str, what: str) -> None:
        """Tell all ranks; of several failures they hear the first."""
        with suppress(RuntimeError):  # rank 0, where the store lives, is gone: they will notice
            self._store.compare_set(key, "", what)

    def close(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        beats, seen, now, failed_at = 0, "", "", None
        seen_at = time.monotonic()
        while not self._over.wait(LOOK):
            beats += 1
            try:
                self._store.set(f"alive-{self._rank}", f"{beats} {self.label}")
                now = self._read(f"alive-{self._neighbour}")
                self.stopped = self.stopped or bool(self._read(_STOPPED))
                self.failed = self.failed or self._read(_FAILED)
            except RuntimeError:
                self.failed = self.failed or "rank 0 is gone"
            if now != seen:
                seen, seen_at = now, time.monotonic()
            elif time.monotonic() - seen_at > SILENCE:
                at = seen.partition(" ")[2] or "start"
                self.tell(_FAILED, f"{at}: rank {self._neighbour} has shown no sign of life for {SILENCE:.0f} s")
            if self.stopped or self.failed:
                # A run in training saves and ends at its next step. One that has not come so far is asked again.
                interrupt_main(SIGTERM)
            if self.failed:
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > GRACE:
                    print(f"moe-dist [rank {self._rank}]: ending, since {self.failed}", file=sys.stderr, flush=True)
                    os._exit(EXIT_TRANSIENT)

    def _read(self, key: str) -> str:
        """The value of a key, '' where it has none: `get` would wait for one."""
        return self._store.get(key).decode() if self._store.check([key]) else ""
