"""Posing a problem: from the user's configuration to a model of a few layers, its run, and the rows for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from moe_dist.config.schema import RunConfig
from moe_dist.errors import UserError
from moe_dist.launch.preflight import facts_of_one
from moe_dist.models.mixse.spec import read_spec
from moe_dist.models.skeleton import make_config, read_config
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.prove.cut import copy_layers, make_random
from moe_dist.prove.layers import (
    check_layers,
    choices,
    cut_config,
    cut_selection,
    cut_to,
    describe_layers,
    layers_path,
)
from moe_dist.prove.plain import BYTES_A_PARAMETER
from moe_dist.prove.problem import MOST, Problem, run_config, size_of_rows
from moe_dist.train.build import ModelPlan, plan_model
from moe_dist.train.table import human_bytes
from moe_dist.train.trainable import Selection

MODEL = "model"  # the folder of the cut model, in that of the proof


def pose(
    config: RunConfig, work: Path, grid: Grid, *, layers: Sequence[int] | None = None
) -> tuple[Problem, Selection]:
    """(the problem, what trains of the cut model), once the cut model is in `work`. One process."""
    if config.lora.rank:
        raise UserError("prove: runs with LoRA are not served, only those that train a model's own weights")
    plan = plan_model(config, Grid.single())
    if read_spec(plan.skeleton.config) is not None:
        raise UserError("prove: mixtures of LoRA experts are not served, only models of transformers and of Nexus")
    found, stages = describe_layers(plan.skeleton, plan.selection), config.parallel.pipeline
    if layers is None:
        problem, selection = _first_that_plans(config, plan, choices(found, stages=stages), work, grid)
    else:
        kept = check_layers(layers, len(found), stages=stages)
        problem, selection = _posed(config, plan, kept, *cut_config(_whole(config, plan), kept), work, grid)
    folder = work / MODEL
    _check_room(problem, grid)
    if plan.folder is None:
        make_random(read_config(folder), folder, seed=config.model.seed)
    else:
        copy_layers(plan.folder, read_config(plan.folder), problem.kept, folder)
    return problem, selection


def _first_that_plans(
    config: RunConfig, plan: ModelPlan, choices: Iterable[list[int]], work: Path, grid: Grid
) -> tuple[Problem, Selection]:
    """The problem of the first choice of layers that the layout can train; else the error of the first one."""
    first = None
    for choice in choices:
        try:
            return _posed(config, plan, *cut_to(_whole(config, plan), choice), work, grid)
        except UserError as error:
            first = first or error
    raise first


def _whole(config: RunConfig, plan: ModelPlan) -> PreTrainedConfig:
    """The configuration of the user's model."""
    return (
        make_config(dict(config.model.config), where="model.config")
        if plan.folder is None
        else read_config(plan.folder)
    )


def _posed(
    config: RunConfig,
    plan: ModelPlan,
    kept: Sequence[int],
    cut: PreTrainedConfig,
    notes: Sequence[str],
    work: Path,
    grid: Grid,
) -> tuple[Problem, Selection]:
    """As `pose` for these layers, with the configuration of the cut model written, and no weights yet."""
    cut.save_pretrained(work / MODEL)
    text = cut.get_text_config()
    size, micro_batches, length = size_of_rows(
        config,
        grid,
        experts=max((layer.spec.num_experts for _, layer in moe_layers(plan.skeleton)), default=0),
        top_k=getattr(text, "num_experts_per_tok", None) or 1,
        longest=getattr(text, "max_position_embeddings", None) or MOST,
    )
    trainable = cut_selection(plan.skeleton, plan.selection, kept)
    made, more = run_config(config, trainable, model=work / MODEL, work=work, length=length)
    made.train.micro_batch_size, made.train.global_batch_size = size, size * micro_batches * grid.data
    problem = Problem(
        config=made,
        kept=tuple(kept),
        layers=plan.skeleton.config.get_text_config().num_hidden_layers,
        layers_path=layers_path(plan.skeleton),
        vocabulary=text.vocab_size,
        pad_id=text.pad_token_id if isinstance(text.pad_token_id, int) else -1,
        micro_batches=micro_batches,
        rows=size * micro_batches * grid.data,
        length=length,
        packed=config.data.packing is True,
        bf16=config.train.precision == "bf16",
        work=work,
        notes=(*notes, *more),
    )
    return problem, plan_model(made, grid).selection


def _check_room(problem: Problem, grid: Grid) -> None:
    """UserError where the plain process would not fit into the memory of rank 0's device."""
    needed, free = memory_of_plain(problem), facts_of_one(grid.device, problem.work)["free"]
    if free is not None and needed > free:
        raise UserError(
            f"the plain process needs {human_bytes(needed)} for layers {', '.join(map(str, problem.kept))}, and "
            f"{human_bytes(free)} are free here: keep fewer layers (--layers), or take a larger host for rank 0"
        )


def memory_of_plain(problem: Problem) -> int:
    """Bytes that the plain process needs at most, beside activations."""
    skeleton = plan_model(problem.config, Grid.single()).skeleton
    return BYTES_A_PARAMETER * sum(parameter.numel() for parameter in skeleton.parameters())
