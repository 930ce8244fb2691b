"""Steps of all ranks on shared files, of which any may fail on any rank: a full disk, say."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from moe_dist.errors import UserError
from moe_dist.parallel.grid import Grid


class Together:
    """Steps in which some rank may fail: all ranks take part in every exchange, and all raise the first failure."""

    def __init__(self, grid: Grid, what: str):
        self.grid, self.what = grid, what
        self.error: Exception | None = None

    def attempt(self, step: Callable[[], object]) -> None:
        """Do a step unless one has failed here; a failure is told to the others at the next `run`."""
        if self.error is None:
            try:
                step()
            except (OSError, UserError) as error:
                self.error = error

    def run(self, step: Callable[[], object], *, only: bool = True) -> None:
        """Do a step (on the ranks where `only`), wait for the others, and raise on all ranks if it failed on any."""
        if only:
            self.attempt(step)
        message = None if self.error is None else f"{self.what} failed: {self.error}"
        messages = [message]
        if self.grid.world > 1:
            messages = [None] * self.grid.world
            dist.all_gather_object(messages, message)
        failed = [message for message in messages if message is not None]
        if failed:
            raise UserError(failed[0])
