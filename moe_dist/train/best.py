"""Which checkpoint of a run is the best by held-out loss, for `checkpoint.keep_best`.

What is compared is the plain mean over the domains of `data.eval` of their loss per label token: every domain counts
the same, however many tokens it has. Evaluations count at multiples of `train.eval_every` and after `train.steps`, so
that a run that was stopped and resumed in between has the same candidates as one that was not. The first of equals
wins, and a mean that is not finite never does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from moe_dist import checkpoint
from moe_dist.checkpoint import Group
from moe_dist.config.schema import RunConfig
from moe_dist.data.fingerprint import digest
from moe_dist.data.loader import EvalSet


class Best:
    """`step` and `loss` of the best so far; None and infinity while there is none, and where the run keeps none."""

    def __init__(self, config: RunConfig, domains: Mapping[str, EvalSet], group: Group):
        self.group = group
        self.keeps = config.checkpoint.keep_best
        self.step: int | None = None
        self.loss = math.inf
        self._before: tuple[int | None, float] = None, math.inf
        self._every, self._end = config.train.eval_every, config.train.steps
        # Losses over other text are not to be compared with.
        held_out = {name: domain.rows.meta["identity"] for name, domain in domains.items()}
        self._over = digest([config.train.eval_batches, held_out])

    def counts(self, step: int) -> bool:
        """Whether the model after `step` steps is a candidate: it is then evaluated before it is saved."""
        return self.keeps and (step % self._every == 0 or step == self._end)

    def judge(self, step: int, results: Mapping[str, Mapping[str, float]]) -> bool:
        """Whether the evaluation of `step` is the best so far, which it then is. Collective: rank 0's word counts."""
        mean = self.group.gather(sum(domain["loss"] for domain in results.values()) / len(results))[0]
        better = math.isfinite(mean) and mean < self.loss
        if better:
            self._before = self.step, self.loss
            self.step, self.loss = step, mean
        return better

    def forget(self, step: int) -> None:
        """The model of that step could not be saved: if it was the best, the one before it is again."""
        if self.step == step:
            self.step, self.loss = self._before

    def state(self) -> dict | None:
        """What a checkpoint keeps of it."""
        return None if self.step is None else {"step": self.step, "loss": self.loss, "over": self._over}

    def restore(self, state: Mapping | None, root: Path) -> None:
        """Take up what the checkpoint knew that the run goes on from, and make `best` in `root` say so. Collective.

        state: `state()` of then, None for a run that starts. A best that was measured on other text, or that is no
        longer in `root`, is forgotten.
        """
        known = self.keeps and state is not None and state["over"] == self._over
        if known and self.group.gather((root / f"step-{int(state['step'])}").is_dir())[0]:
            self.step, self.loss = int(state["step"]), float(state["loss"])
        checkpoint.mark_best(root, self.step, group=self.group)
