"""The little that saving and loading ask of a process group: who am I, and what does everybody say.

Keeping it this small lets one process, threads in a test, or any `torch.distributed` group stand behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from moe_dist.checkpoint.errors import CheckpointError, NoSpaceError


class Group(Protocol):
    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Collective: the `value` of every rank, in rank order, on every rank."""


class SingleProcess:
    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


class TorchGroup:
    """A `torch.distributed` group; None means the world.

    Pass a gloo group: the objects are small and live on the CPU, and a save must not touch the accelerator's stream.
    """

    def __init__(self, process_group: Any = None) -> None:
        import torch.distributed as dist

        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)

    def gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.process_group)
        return values


SINGLE = SingleProcess()


def all_or_none(group: Group, work: Callable[[], Any], *, what: str) -> list[Any]:
    """Collective: run `work` on every rank; all get every rank's result, or all raise one and the same error.

    An exception on one rank alone would leave the others waiting in the next collective, so it is told to all first.
    `what` opens the message ("checkpoint step-40 was not saved").
    """
    result, failure, cause = None, None, None
    try:
        result = work()
    except Exception as error:
        known = isinstance(error, CheckpointError)
        failure = (isinstance(error, NoSpaceError), str(error) if known else f"{type(error).__name__}: {error}")
        cause = error
    outcomes = group.gather((result, failure))
    failures = [(rank, *failed) for rank, (_, failed) in enumerate(outcomes) if failed]
    if not failures:
        return [result for result, _ in outcomes]
    if group.size == 1:
        message = f"{what}: {failures[0][2]}"
    else:
        message = f"{what}: " + "; ".join(f"rank {rank}: {text}" for rank, _, text in failures)
    kind = NoSpaceError if any(full for _, full, _ in failures) else CheckpointError
    raise kind(message) from cause
