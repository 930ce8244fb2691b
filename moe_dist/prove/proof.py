"""A proof from beginning to end: cut, ask the plain process, train in the layout, compare, certify."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
import transformers

from moe_dist import __version__
from moe_dist.config.schema import RunConfig
from moe_dist.errors import UserError
from moe_dist.launch.guard import NO_GUARD, Guard
from moe_dist.models.loading import resolve_folder
from moe_dist.models.mixse.spec import read_spec
from moe_dist.models.skeleton import make_config, read_config
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.prove.certificate import Certificate
from moe_dist.prove.cut import copy_layers, make_random
from moe_dist.prove.layers import check_layers, choose, cut_config, cut_selection, cut_to, kinds, layers_path
from moe_dist.prove.plain import BYTES_A_PARAMETER, Plain
from moe_dist.prove.problem import Problem, run_config, size_of_rows
from moe_dist.prove.trial import judge
from moe_dist.train.build import plan_model
from moe_dist.train.ranks import ranks_together
from moe_dist.train.start import on_rank_zero
from moe_dist.train.table import human_bytes

MODEL = "model"  # the folder of the cut model, in that of the proof


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
        certificate = certify(problem, grid, guard=guard)
        guard.beat("the end")
        if grid.rank == 0:
            certificate.write(out)
            if not keep:
                shutil.rmtree(problem.work)
    return certificate


def prepare(config: RunConfig, out: Path, grid: Grid, *, layers: Sequence[int] | None = None) -> Problem:
    """Write the cut model, and what one plain process makes of it, to `out`/work. One process."""
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    problem, selection = pose(config, work, grid, layers=layers)
    Plain(problem, selection, grid.device).run()
    return problem


def pose(config: RunConfig, work: Path, grid: Grid, *, layers: Sequence[int] | None = None):
    """(the problem, what trains of the cut model), once the cut model is in `work`. One process."""
    if config.lora.rank:
        raise UserError("prove: LoRA has no layout to prove; leave out the section lora, or train without a proof")
    plan = plan_model(config, Grid.single())
    architecture = plan.skeleton.config
    if read_spec(architecture) is not None:
        raise UserError("prove: mixtures of LoRA experts are not served")
    whole = (
        make_config(dict(config.model.config), where="model.config")
        if plan.folder is None
        else read_config(plan.folder)
    )
    found, routed = kinds(plan.skeleton, plan.selection)
    stages = config.parallel.pipeline
    if layers is None:
        kept, cut, notes = cut_to(whole, choose(found, routed, stages=stages))
    else:
        kept = check_layers(layers, len(found), stages=stages)
        cut, notes = cut_config(whole, kept)
    folder = work / MODEL
    if plan.folder is None:
        make_random(cut, folder, seed=config.model.seed)
    else:
        copy_layers(resolve_folder(config.model.path), whole, cut, kept, folder)
    text = cut.get_text_config()
    experts = max((layer.spec.num_experts for _, layer in moe_layers(plan.skeleton)), default=0)
    size, micro_batches, length = size_of_rows(
        config, grid, experts=experts, top_k=getattr(text, "num_experts_per_tok", 1) or 1,
        longest=getattr(text, "max_position_embeddings", None) or 1 << 30,
    )  # fmt: skip
    trainable = cut_selection(plan.skeleton, plan.selection, kept)
    made, more = run_config(config, trainable, model=folder, work=work, length=length)
    made.train.micro_batch_size, made.train.global_batch_size = size, size * micro_batches * grid.data
    problem = Problem(
        config=made,
        kept=tuple(kept),
        layers=len(found),
        layers_path=layers_path(plan.skeleton),
        vocabulary=text.vocab_size,
        pad_id=text.pad_token_id if isinstance(text.pad_token_id, int) else -1,
        micro_batches=micro_batches,
        rows=size * micro_batches * grid.data,
        length=length,
        packed=config.data.packing is True,
        work=work,
        notes=(*notes, *more),
    )
    return problem, plan_model(made, Grid.single()).selection


def certify(problem: Problem, grid: Grid, *, guard: Guard = NO_GUARD) -> Certificate:
    """Run the trial of a prepared problem and gather its checks. Collective."""
    certificate = Certificate(_facts(problem, grid), list(problem.notes))
    for check in judge(problem, grid, guard=guard):
        certificate.checks.append(check)
    return certificate


def memory_of_plain(problem: Problem) -> int:
    """Bytes that the plain process needs at most, beside activations."""
    skeleton = plan_model(problem.config, Grid.single()).skeleton
    return BYTES_A_PARAMETER * sum(parameter.numel() for parameter in skeleton.parameters())


def _facts(problem: Problem, grid: Grid) -> dict[str, object]:
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
