"""A run's model outside of training: with the weights of one of its checkpoints, for evaluation and export."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from moe_dist import checkpoint
from moe_dist.checkpoint import SINGLE, Group
from moe_dist.config.load import load
from moe_dist.config.schema import RunConfig
from moe_dist.data.attention import check_packing
from moe_dist.data.loader import build_data
from moe_dist.errors import UserError
from moe_dist.models.export import export_model
from moe_dist.parallel.grid import Grid, build_grid
from moe_dist.train import run_folder, state
from moe_dist.train.build import ModelPlan, build_model, load_tokenizer, plan_model
from moe_dist.train.evaluate import held_out
from moe_dist.train.loop import to_device
from moe_dist.train.lora import write_adapter
from moe_dist.train.passes import run_forwards
from moe_dist.train.routing import Routing
from moe_dist.train.start import start_ranks


def chosen_checkpoint(source: str | Path, *, group: Group = SINGLE) -> Path:
    """The checkpoint that stands for a run: the best by held-out loss where it keeps one, else the newest whole one.

    source: a run folder, its checkpoints folder, or one checkpoint, which is then itself meant. Collective over
    `group`; rank 0 says on stderr when it is the best that is taken. Raises UserError where there is none, or where the
    best is named and missing.
    """
    found = _find(Path(source), group)
    if found is None:
        raise UserError(f"{source} holds no complete checkpoint; train with checkpoint.save_last=true first")
    return found


def export_run(source: str | Path, out: str | Path) -> tuple[Path, int]:
    """Write the model of a run (see `chosen_checkpoint`) or of one checkpoint as a Hugging Face folder. One process.

    Weights have the dtype in which the run's model is stored; the fp32 masters are rounded to it once. Of a run with
    LoRA it is the adapter that is written, in PEFT's format. Returns the folder and the checkpoint's step. Raises
    UserError where there is no run or no complete checkpoint.
    """
    source, grid = Path(source), Grid.single()
    folder = run_of(source)
    config = load(folder / run_folder.CONFIG, paths=False)
    with checkpoint.open_checkpoint(chosen_checkpoint(source), verify="full") as opened:
        plan = plan_model(config, grid)
        if config.lora.rank:
            return write_adapter(opened, config, plan, out), opened.step
        model = build_model(config, plan, grid)
        if plan.folder is not None:
            opened.check_base(plan.folder)
        state.load_weights(opened, model)
        step = opened.step
    return export_model(model, out, tokenizer=load_tokenizer(config, plan), grid=grid), step


def evaluate_run(config: RunConfig, *, weights: str | None = None) -> tuple[int | None, dict[str, dict[str, float]]]:
    """Held-out loss and perplexity by domain of `data.eval`. Collective: every rank of the launcher calls it.

    weights: a run or checkpoint folder, as `chosen_checkpoint` takes it; None takes that of `run.dir` if there is
    one, else the model as configured. Returns the step of the weights (None: the configured model) and the figures
    of each domain.
    """
    device = start_ranks()
    grid = build_grid(expert=config.parallel.expert, node_size=config.parallel.node_size, device=device)
    plan = plan_model(config, grid)
    data = build_data(config.data, load_tokenizer(config, plan), seed=config.run.seed)
    if not data.eval:
        raise UserError("data.eval is empty: name at least one held-out domain, or set data.eval_fraction")
    model = build_model(config, plan, grid).eval()
    if config.data.packing is True:
        check_packing(model.config)
    step = _lay_over(model, plan, Path(weights or config.run.dir), grid, required=weights is not None)
    routing = Routing(model, config.moe, grid)

    def losses(batches: Iterable[dict]) -> Iterator[torch.Tensor]:
        return run_forwards(model, model, routing, batches, grid)

    results = {}
    for domain, rows in data.eval.items():
        batches = rows.batches(
            rank=grid.data_rank,
            ranks=grid.data,
            micro_batch=config.train.micro_batch_size,
            limit=config.train.eval_batches,
        )
        results[domain] = held_out(losses, model, (to_device(batch, device) for batch in batches), grid)
    return step, results


def _lay_over(model: nn.Module, plan: ModelPlan, place: Path, grid: Grid, *, required: bool) -> int | None:
    found = _find(place, state.group_of(grid)) if place.is_dir() else None
    if found is None:
        if required:
            raise UserError(f"{place} holds no complete checkpoint")
        return None
    with checkpoint.open_checkpoint(found) as opened:
        if plan.folder is not None:
            opened.check_base(plan.folder)
        state.load_weights(opened, model)
        return opened.step


def run_of(source: Path) -> Path:
    """The run folder that a path lies in: itself, its checkpoints folder, or a checkpoint of it."""
    for folder in (source, *source.absolute().parents[:2]):
        if (folder / run_folder.CONFIG).is_file():
            return folder
    raise UserError(f"{source} is neither a run folder nor a checkpoint in one: there is no {run_folder.CONFIG}")


def _find(source: Path, group: Group) -> Path | None:
    root = source / run_folder.CHECKPOINTS if (source / run_folder.CHECKPOINTS).is_dir() else source
    best = checkpoint.best_step(root, group=group)
    if best is None or (source / "manifest.json").exists():
        return state.find(source, group)
    if group.rank == 0:
        print(f"{root}: taking step-{best}, the best by held-out loss", file=sys.stderr, flush=True)
    return root / f"step-{best}"
