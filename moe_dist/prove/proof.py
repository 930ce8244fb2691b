"""A proof from beginning to end: cut, ask the plain process, train in the layout, compare, certify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
import transformers

from moe_dist import __version__
from moe_dist.config.schema import RunConfig
from moe_dist.launch.guard import NO_GUARD, Guard
from moe_dist.parallel.grid import Grid
from moe_dist.prove.bf16 import distance
from moe_dist.prove.certificate import Certificate
from moe_dist.prove.plain import FIGURES, Plain
from moe_dist.prove.pose import memory_of_plain, pose
from moe_dist.prove.problem import Problem
from moe_dist.prove.trial import judge
from moe_dist.train.build import plan_model
from moe_dist.train.ranks import ranks_together
from moe_dist.train.start import on_rank_zero
from moe_dist.train.table import human_bytes


def prove(config: RunConfig, out: Path, *, layers: Sequence[int] | None = None, keep: bool = False) -> Certificate:
    """Prove the layout of `config` on the ranks that run, and write `out`/certificate.json. Collective.

    layers: those of the model to keep; one of each kind when absent. keep: leave the cut model and the plain process'
    tensors in `out`, a folder that all ranks see. Raises UserError for what no proof is possible of.
    """
    meeting = deepcopy(config)
    meeting.run.dir = str(out)
    with ranks_together(meeting) as ranks:
        grid, guard = ranks.grid, ranks.guard
        guard.beat("loading the model")
        problem = on_rank_zero(lambda: prepare(config, out, grid, layers=layers))
        ranks.check_room(problem.config, plan_model(problem.config, grid))
        certificate = Certificate(facts_of(problem, grid), list(problem.notes))
        try:
            certify(certificate, problem, grid, guard=guard)
        finally:  # what was off before something broke may be why it did
            if grid.rank == 0:
                certificate.write(out)
        guard.beat("the end")
        if grid.rank == 0 and not keep:
            shutil.rmtree(problem.work)
    return certificate


def prepare(config: RunConfig, out: Path, grid: Grid, *, layers: Sequence[int] | None = None) -> Problem:
    """Write the cut model, and what one plain process makes of it, to `out`/work. One process."""
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    problem, selection = pose(config, work, grid, layers=layers)
    figures = Plain(problem, selection, grid.device).run()
    if problem.bf16:
        figures["bf16"] = distance(problem, selection, grid.device)
    (work / FIGURES).write_text(json.dumps(figures))
    return problem


def certify(certificate: Certificate, problem: Problem, grid: Grid, *, guard: Guard = NO_GUARD) -> None:
    """Run the trial of a prepared problem and add its checks. Collective."""
    for check in judge(problem, grid, guard=guard):
        certificate.checks.append(check)
    certificate.complete = True


def facts_of(problem: Problem, grid: Grid) -> dict[str, object]:
    """What is run, for the head of the certificate."""
    config = problem.config
    parallel, moe, train = config.parallel, config.moe, config.train
    names = ("pipeline", "data", "sequence", "tensor", "expert")
    axes = {name: getattr(grid, name) for name in names if getattr(grid, name) > 1}
    routing = (
        f"balance loss {moe.balance_loss} x {moe.balance_coef:g}" if moe.balance_loss != "none" else "no balance loss"
    )
    kept = ", ".join(map(str, problem.kept))
    memory = human_bytes(memory_of_plain(problem))
    backend = f"experts by {moe.experts_backend}, placement {parallel.placement}"
    return {
        "model": f"layers {kept} of {problem.layers}; plain process: {memory} of memory",
        "ranks": ", ".join([str(grid.world), *(f"{name} {size}" for name, size in axes.items()), grid.device.type]),
        "layout": f"ZeRO {parallel.zero_stage}, buckets of {parallel.reduce_bucket_size:,}, dispatcher "
        f"{moe.dispatcher}, wire {moe.wire}, {moe.chunks} chunk(s), {backend}"
        + (", recompute" if train.recompute else ""),
        "losses": f"{routing}, z-loss x {moe.z_loss_coef:g}, expert bias by {moe.expert_bias_rate:g}",
        "rows": f"{problem.rows} of {problem.length} tokens a step: {grid.data} data rank(s) x {problem.micro_batches} "
        f"micro-batches x {train.micro_batch_size}; {problem.labels(0)} labels in the first step",
        "versions": f"moe_dist {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
