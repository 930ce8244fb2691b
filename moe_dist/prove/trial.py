"""The training under proof, by the code that `moe-dist train` runs, on all ranks, and its comparison with the judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from functools import partial

from moe_dist import checkpoint
from moe_dist.launch.guard import NO_GUARD, Guard
from moe_dist.parallel.grid import Grid
from moe_dist.prove import plain
from moe_dist.prove.bf16 import in_bf16, judge_bf16
from moe_dist.prove.certificate import Check
from moe_dist.prove.compare import GRADIENTS, NORMS, OUTPUTS, WEIGHTS, by_step, fragments, frozen, kept_state, resumed
from moe_dist.prove.errors import everyone
from moe_dist.prove.outputs import Outputs
from moe_dist.prove.problem import RATES, Problem
from moe_dist.train import state
from moe_dist.train.build import ModelPlan, build_model, plan_model
from moe_dist.train.engine import Engine, build_engine
from moe_dist.train.evaluate import held_out
from moe_dist.train.passes import run_forwards, run_passes
from moe_dist.train.routing import Routing

LAST = len(RATES) - 1


class Trial:
    """The training of a problem in its layout. All methods are collective."""

    def __init__(self, problem: Problem, grid: Grid, *, clip_norm: float | None, guard: Guard = NO_GUARD):
        self.problem, self.grid, self.guard = problem, grid, guard
        config, settings = problem.config, problem.config.train
        guard.beat("loading the model")
        self.plan: ModelPlan = plan_model(config, grid)
        model = build_model(config, self.plan, grid)
        self.engine: Engine = build_engine(
            model,
            grid,
            zero_stage=config.parallel.zero_stage,
            precision=settings.precision,
            betas=tuple(settings.betas),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            clip_norm=clip_norm,
            accumulation_steps=problem.micro_batches,
            reduce_bucket_size=config.parallel.reduce_bucket_size,
        )
        self.routing = Routing(model, config.moe, grid)

    def passes(self, step: int) -> float:
        """Forwards and backwards of a step; the mean loss of a label token over all ranks."""
        self.routing.start_step()
        labels = self.problem.labels(step)
        batches, _ = self.problem.batches(step, self.grid)
        done = run_passes(self.engine, self.routing, batches, labels=labels, grid=self.grid, guard=self.guard)
        return sum(everyone(done.loss_sum.item(), self.grid)) / labels

    def update(self, step: int) -> float:
        """Clip and step; the norm before clipping."""
        self.guard.beat("the update")
        result = self.engine.step(RATES[step])
        self.routing.end_step(skipped=result.skipped)
        return result.grad_norm

    def held_out(self) -> float:
        """The mean loss of a label token of the first step's rows, as evaluations take it."""
        batches, _ = self.problem.batches(0, self.grid)
        losses = partial(
            run_forwards, self.engine.forward, self.engine.module, self.routing, grid=self.grid, guard=self.guard
        )
        return held_out(losses, self.engine.module, batches, self.grid)["loss"]

    def save(self) -> None:
        self.guard.beat("saving")
        root = self.problem.work / "checkpoints"
        state.save(root, LAST, self.problem.config, self.engine, self.plan, self.grid, sampler={}, tokens=0)

    def restore(self) -> None:
        self.guard.beat("resuming")
        with checkpoint.open_checkpoint(self.problem.work / "checkpoints" / f"step-{LAST}") as opened:
            state.restore(opened, self.engine, self.plan)

    def rounding(self) -> dict[str, float]:
        """What rounding alone makes of gradients, see `plain.rounding`. On rank 0."""
        return plain.rounding(self.problem, self.plan.selection, self.grid.device)

    def close(self) -> None:
        self.engine.close()


def judge(problem: Problem, grid: Grid, *, guard: Guard = NO_GUARD) -> Iterator[Check]:
    """Train as the config says, and check against what `Plain.run` has left in the problem's folder, one thing after
    the other as it becomes known. Collective; every rank gets the same checks, and may stop at any of them."""
    expected = json.loads((problem.work / plain.FIGURES).read_text())
    options = {"clip_norm": expected["clip_norm"], "guard": guard}
    with closing(Trial(problem, grid, **options)) as trial:
        yield from _three_steps(trial, expected)
        kept = kept_state(trial.engine)
    with closing(Trial(problem, grid, **options)) as again:
        again.restore()
        again.passes(LAST)
        again.update(LAST)
        yield resumed(again.engine, kept, problem, grid)
    if problem.bf16:
        with closing(Trial(in_bf16(problem), grid, **options)) as rounded:
            yield from judge_bf16(rounded, expected)


def _three_steps(trial: Trial, expected: dict) -> Iterator[Check]:
    problem, grid, engine = trial.problem, trial.grid, trial.engine
    losses, norms, evaluated = [], [], [trial.held_out()]
    with Outputs(engine.module, problem, grid) as outputs:
        losses.append(trial.passes(0))
    yield from outputs.compare(expected["reached"])
    trial.guard.beat("loading the model")  # the plain process may be asked once more
    gradients = {"file": plain.GRADIENTS, "tolerance": GRADIENTS, "rounding": trial.rounding}
    yield fragments("gradients", engine.gradients(), problem, grid, **gradients)
    norms.append(trial.update(0))
    for step in range(1, len(RATES)):
        if step == LAST:
            trial.save()
        losses.append(trial.passes(step))
        norms.append(trial.update(step))
    evaluated.append(trial.held_out())
    before, after = by_step(evaluated, expected["held_out"]).values()
    yield Check.of("loss", by_step(losses, expected["losses"]) | {"held out": before}, OUTPUTS)
    # A function of the weights, which may be so far off.
    yield Check.of("evaluation", {"after three steps": after}, WEIGHTS)
    errors = {
        f"{step}, rank {rank}": error
        for rank, own in enumerate(everyone(norms, grid))
        for step, error in by_step(own, expected["norms"]).items()
    }
    yield Check.of("clip norm", errors, NORMS)
    yield fragments("weights", engine.fragments("weights"), problem, grid, file=plain.WEIGHTS, tolerance=WEIGHTS)
    yield frozen(engine, expected["buffers"], problem, grid)
