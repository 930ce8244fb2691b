"""The checkpoints of a run: saved at once or while training goes on, and what happens where that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_dist.checkpoint import BackgroundSave, CheckpointError
from moe_dist.config.schema import RunConfig
from moe_dist.launch.guard import Guard
from moe_dist.parallel.grid import Grid
from moe_dist.train import run_folder, state
from moe_dist.train.best import Best
from moe_dist.train.build import ModelPlan
from moe_dist.train.engine import Engine
from moe_dist.train.metrics import MetricLog


class Saver:
    """Saves into the run's folder as the `checkpoint` section says. All methods but `vote` are collective.

    In the background at most one save is under way: the next one waits for it, and so do the end of the run and a stop.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        plan: ModelPlan,
        grid: Grid,
        *,
        best: Best,
        log: MetricLog,
        guard: Guard,
    ):
        self.root = Path(config.run.dir) / run_folder.CHECKPOINTS
        self._config, self._engine, self._plan, self._grid = config, engine, plan, grid
        self._best, self._log, self._guard = best, log, guard
        self._pending: BackgroundSave | None = None
        self._pending_best: int | None = None

    def save(self, step: int, *, sampler: dict, tokens: int, last: bool = False) -> bool:
        """Save the model after `step` steps; whether it is saved, or on its way. last: the run ends here, so that it
        is saved when this returns.

        Raises CheckpointError on every rank alike where a save fails and `checkpoint.on_error` is stop, or it is the
        last one: a run that ends well has been saved.
        """
        self.settle()
        contents = {"sampler": sampler, "tokens": tokens, "best": self._best}
        parts = self._config, self._engine, self._plan, self._grid

        def begin() -> None:
            saved = state.contents(step, *parts, **contents)
            self._pending = BackgroundSave(self.root, step, group=state.group_of(self._grid), **saved)
            self._pending_best = self._best.step

        def at_once() -> None:
            self._log.say(f"saved {state.save(self.root, step, *parts, **contents)}")

        in_background = self._config.checkpoint.background and not last
        return self._attempt(begin if in_background else at_once, step, must=last)

    def vote(self) -> int:
        """What this rank adds to the sum over all ranks by which `look` sees that a save in the background has ended:
        1 where its part is written, as much as all ranks together where that has failed, else 0."""
        if self._pending is None or not self._pending.done:
            return 0
        return self._grid.world if self._pending.failed else 1

    def look(self, votes: int) -> None:
        """Commit the save in the background if `votes`, the sum of all ranks' `vote`, says that it has ended."""
        if votes >= self._grid.world:
            self.settle()

    def settle(self, *, last: bool = False) -> None:
        """Wait for the save in the background, if there is one, and commit it. Raises as `save` does."""
        pending, self._pending = self._pending, None
        if pending is None:
            return

        self._guard.beat("saving")  # the wait may be longer than a step

        def commit() -> None:
            path = pending.commit()
            state.tidy(self._config, self.root, self._grid, best=self._pending_best, whole=path.name)
            self._log.say(f"saved {path}")

        self._attempt(commit, pending.step, must=last)

    def _attempt(self, work: Callable[[], None], step: int, *, must: bool) -> bool:
        try:
            work()
            return True
        except CheckpointError as error:
            self._best.forget(step)
            if must or self._config.checkpoint.on_error == "stop":
                raise
            self._log.say(f"warning: {error}; training goes on, as checkpoint.on_error says")
            self._log.write("checkpoint_failed", step, error=str(error))
            return False
