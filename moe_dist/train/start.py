"""Bringing the ranks of a run together: device, process group, and errors that all of them share."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.errors import HostFailure, UserError
from moe_dist.launch.environment import apply, gpu_of

# Long enough for rank 0 to tokenise a data set while the others wait.
TIMEOUT = timedelta(hours=2)
SLOW_START = 45.0  # seconds after which rank 0 says for whom it waits
SHARE, HEAR = 1.0, 5.0  # seconds that the others get to hear why it ends, and for which they listen longer


def start_ranks() -> torch.device:
    """Choose this rank's device and form the process group, if there are several ranks."""
    device = choose_device()
    form_group(device, store=meet())
    return device


def choose_device() -> torch.device:
    """Derive the rank environment and choose this rank's device: a GPU where there is one, each rank its own; the CPU
    otherwise, and where MOE_DIST_DEVICE=cpu asks for it."""
    place = apply()
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("MOE_DIST_DEVICE") != "cpu":
        device = torch.device("cuda", gpu_of(place, visible=torch.cuda.device_count(), environ=os.environ))
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the index of the device
    return device


def meet(*, name: str = "", timeout: float = 300.0) -> dist.Store | None:
    """The store by which the ranks find each other, once all of them are there; None for a single rank.

    name: says which run this is, so that a rank which reaches another job's store is not taken for one of ours.
    timeout: seconds in which all ranks have to come. Raises HostFailure, which names those that have not.
    """
    world, rank = world_size(), int(os.environ.get("RANK", "0"))
    if world == 1:
        return None
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        return dist.PrefixStore(f"start-{store.add(f'starts-{rank}', 1)}", store)
    store = dist.PrefixStore(hashlib.sha256(name.encode()).hexdigest()[:16], _connect(rank, world, timeout))
    store.set(f"came-{rank}", socket.gethostname())
    if rank == 0:
        store.set("all", _await_all(store, world, timeout) or "come")
    try:
        store.wait(["all"], timedelta(seconds=timeout + HEAR))  # rank 0 may have begun to wait later
        missing = store.get("all").decode()
    except RuntimeError as error:
        raise HostFailure(f"rank 0 has not come within {timeout:.0f} s, or has gone: {_first_line(error)}") from None
    if missing == "come":
        return store
    if rank == 0:
        time.sleep(SHARE)  # the store may live here: the others have to hear it
    raise HostFailure(missing)


def _await_all(store: dist.Store, world: int, timeout: float) -> str:
    """On rank 0: '' once all ranks have come, or what to say of those that have not in time."""
    missing, start, told = list(range(world)), time.monotonic(), False
    while missing := [other for other in missing if not store.check([f"came-{other}"])]:
        waited = time.monotonic() - start
        if waited > timeout:
            return (
                f"{len(missing)} of {world} ranks have not come within {timeout:.0f} s: {_some(missing)}. Look at the "
                "logs of their hosts: a process that did not start, a firewall, or the wrong network "
                "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); launch.join_timeout is how long the others wait"
            )
        if waited > SLOW_START and not told:
            told = True
            print(f"moe-dist: still waiting for {_some(missing)} of {world}", file=sys.stderr, flush=True)
        time.sleep(0.02 if waited < 5 else 0.5)
    return ""


def _connect(rank: int, world: int, timeout: float) -> dist.Store:
    """A connection to rank 0's store, or to that of torchrun."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not of_torchrun
    made: list = []

    def make() -> None:
        try:
            patience = timedelta(seconds=timeout)
            made.append(dist.TCPStore(host, port, world, serves, patience, wait_for_workers=False, multi_tenant=True))
        except RuntimeError as error:
            made.append(error)

    # Where something else listens at that port, the constructor waits for its answer for ever: in a thread of its own.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(timeout + 1)
    store = made[0] if made else RuntimeError("it does not answer as a store of torch does")
    if isinstance(store, RuntimeError):
        error = store
        if serves:
            raise HostFailure(
                f"cannot listen on port {port} of {socket.gethostname()}, another program has it: choose another one "
                f"(--master_port, MASTER_PORT). {_first_line(error)}"
            ) from None
        raise HostFailure(
            f"rank 0 cannot be reached at {host}:{port} within {timeout:.0f} s: it did not start, a firewall, or the "
            f"wrong address (MASTER_ADDR). {_first_line(error)}"
        ) from None
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"moe-dist-{start}", store)


def _some(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{', ...' * (len(ranks) > 8)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]


def form_group(device: torch.device, *, store: dist.Store | None = None) -> None:
    """Make torch's default process group of the ranks that the environment names, if there are several and none yet.

    store: how they find each other (see `meet`).
    """
    world, rank = world_size(), int(os.environ.get("RANK", "0"))
    if world > 1 and not dist.is_initialized():
        assert store is not None
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world)


def world_size() -> int:
    """How many ranks the launcher has started; needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_rank_zero(work: Callable[[], Any]) -> Any:
    """Collective: run `work` on rank 0 and give its (picklable) result to all; its UserError is raised on all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]
