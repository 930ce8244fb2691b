"""Bringing the ranks of a run together: device, process group, and errors that all of them share."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.errors import UserError
from moe_dist.launch.environment import apply, gpu_of

# Long enough for rank 0 to tokenise a data set while the others wait.
TIMEOUT = timedelta(hours=2)


def start_ranks() -> torch.device:
    """Derive the rank environment, choose this rank's device, and form the process group if there are several ranks.

    A GPU where there is one, each rank its own; the CPU otherwise, and where MOE_DIST_DEVICE=cpu asks for it.
    """
    place = apply()
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("MOE_DIST_DEVICE") != "cpu":
        device = torch.device("cuda", gpu_of(place, visible=torch.cuda.device_count(), environ=os.environ))
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the index of the device
    form_group(device)
    return device


def form_group(device: torch.device, *, store: dist.Store | None = None) -> None:
    """Make torch's default process group of the ranks that the environment names, if there are several and none yet.

    store: how they find each other; the launcher's when absent.
    """
    world, rank = world_size(), int(os.environ.get("RANK", "0"))
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        where = {} if store is None else {"store": store, "rank": rank, "world_size": world}
        dist.init_process_group(backend, timeout=TIMEOUT, **where)


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
