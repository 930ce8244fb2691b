"""What a checkpoint of a training run holds, and how it gets back: into an engine, or into a plain model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from moe_dist import checkpoint
from moe_dist.checkpoint import NOT_EXPERT, SINGLE, Checkpoint, Fragment, FrozenBase, Group, Place, TensorInfo
from moe_dist.config.save import to_dict
from moe_dist.config.schema import RunConfig
from moe_dist.errors import UserError
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.train.best import Best
from moe_dist.train.build import ModelPlan
from moe_dist.train.engine import Engine
from moe_dist.train.family import is_expert
from moe_dist.train.pieces import KINDS

BUFFERS = "buffers"


def group_of(grid: Grid) -> Group:
    return SINGLE if grid.world == 1 else checkpoint.TorchGroup()


def find(place: Path, group: Group) -> Path | None:
    """The checkpoint that `place` means: itself, or the newest whole one in a folder of them. Collective.

    Every byte of it is read. A run folder stands for its checkpoints. None where there is none at all. UserError where
    `place` is itself one and damaged, or holds damaged ones only: starting over without a word would throw away what
    might be saved of them.
    """
    if group.gather((place / "manifest.json").exists())[0]:
        checkpoint.verify(place, group=group).raise_if_bad()
        return place
    if (place / "checkpoints").is_dir():
        place = place / "checkpoints"
    found = checkpoint.find_latest(place, group=group)
    for note in found.notes:
        if group.rank == 0:
            print(f"warning: {note}", file=sys.stderr, flush=True)
    if found.path is None and found.notes:
        raise UserError(f"no checkpoint in {place} is whole; restore one, or start anew with --overwrite")
    return found.path


def catalogue(plan: ModelPlan) -> dict[str, TensorInfo]:
    """Every tensor that trains, with its whole shape and its experts' global ids, and every stored buffer."""
    found: dict[str, TensorInfo] = {}
    for name, layer in moe_layers(plan.skeleton):
        ids = plan.selection.experts[name]
        if ids:
            for parameter, shape in layer.spec.shapes().items():
                found[f"{name}.{parameter}"] = TensorInfo(shape, experts=tuple(ids), kinds=KINDS)
    for name, parameter in plan.skeleton.named_parameters():
        if name in plan.selection.names:
            found[name] = TensorInfo(tuple(parameter.shape), kinds=KINDS)
    for name, buffer in stored_buffers(plan.skeleton):
        found[name] = TensorInfo(tuple(buffer.shape), kinds=(BUFFERS,))
    return found


def stored_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that belong to the model's state, such as DeepSeek-V3's expert bias."""
    transient = {name for name, _ in model.named_non_persistent_buffers()}
    for name, buffer in model.named_buffers():
        if name not in transient:
            yield name, buffer


def save(
    root: Path,
    step: int,
    config: RunConfig,
    engine: Engine,
    plan: ModelPlan,
    grid: Grid,
    *,
    sampler: dict,
    tokens: int,
    best: Best | None = None,
) -> Path:
    """Write `root/step-<step>`, each rank what it owns, and drop older ones beyond `checkpoint.keep`. Collective."""
    saved = contents(step, config, engine, plan, grid, sampler=sampler, tokens=tokens, best=best)
    path = checkpoint.save(root, step, group=group_of(grid), **saved)
    tidy(config, root, grid, best=None if best is None else best.step)
    return path


def contents(
    step: int,
    config: RunConfig,
    engine: Engine,
    plan: ModelPlan,
    grid: Grid,
    *,
    sampler: dict,
    tokens: int,
    best: Best | None = None,
) -> dict:
    """What a checkpoint of this run holds, as arguments of `checkpoint.save`; its tensors are views of the engine's.
    Collective."""
    fragments: dict[str, Sequence[Fragment]] = {kind: list(engine.fragments(kind)) for kind in KINDS}
    # Of the ranks that hold a buffer, all those of a stage and perhaps of several, the first one writes it.
    buffers = dict(stored_buffers(engine.module))
    held = group_of(grid).gather(list(buffers))
    earlier = {name for names in held[: grid.rank] for name in names}
    fragments[BUFFERS] = [
        Fragment(name, NOT_EXPERT, 0, buffer.reshape(-1)) for name, buffer in buffers.items() if name not in earlier
    ]
    trainer_state = {
        "step": step,
        "adam_step": engine.adam_step,
        "sampler": sampler,
        "tokens": tokens,
        "best": None if best is None else best.state(),
        "config": to_dict(config),
    }
    return {
        "fragments": fragments,
        "trainer_state": trainer_state,
        "catalogue": catalogue(plan),
        "frozen": _base(engine, plan),
    }


def tidy(config: RunConfig, root: Path, grid: Grid, *, best: int | None, whole: str | None = None) -> None:
    """Make `best` name its step and drop what `checkpoint.keep` does not want. Collective.

    After a save, in this order: what `best` says is always there. whole: a checkpoint that has been read back already.
    """
    if config.checkpoint.keep_best and best is not None:
        checkpoint.mark_best(root, best, group=group_of(grid))
    checkpoint.prune(root, keep=config.checkpoint.keep, whole=whole, group=group_of(grid))


def _base(engine: Engine, plan: ModelPlan) -> FrozenBase | None:
    """Where the frozen weights come from."""
    if plan.folder is None or _all_trains(plan):
        return None
    if not hasattr(engine, "base_fingerprint"):
        engine.base_fingerprint = checkpoint.fingerprint(plan.folder)
    return FrozenBase(str(plan.folder), engine.base_fingerprint)


def _all_trains(plan: ModelPlan) -> bool:
    """Whether no tensor of the whole model is frozen, whichever ranks hold them."""
    dense = {name for name, parameter in plan.skeleton.named_parameters() if not is_expert(parameter)}
    experts = plan.selection.experts
    return dense <= plan.selection.names and all(
        len(experts[name]) == layer.spec.num_experts for name, layer in moe_layers(plan.skeleton)
    )


def restore(opened: Checkpoint, engine: Engine, plan: ModelPlan) -> None:
    """Masters, moments and buffers from a checkpoint of any number of ranks, bit for bit. Collective.

    UserError where it was trained on another base model, or another set of tensors trains.
    """
    opened.check_matches(catalogue(plan))
    if plan.folder is not None:
        opened.check_base(plan.folder)

    def read(kind: str, places: list[Place]) -> Iterator[torch.Tensor]:
        return (opened.read(kind, [place.range])[0] for place in places)

    engine.load_fragments(read, adam_step=int(opened.trainer_state["adam_step"]))
    _restore_buffers(opened, engine.module)


@torch.no_grad()
def load_weights(opened: Checkpoint, model: nn.Module) -> None:
    """The checkpoint's weights over those of a whole model on one process, rounded to the model's dtype."""
    layers = dict(moe_layers(model))
    parameters = dict(model.named_parameters())
    for name, info in opened.catalogue.items():
        if BUFFERS in info.kinds:
            continue
        if info.experts is None:
            parameters[name].copy_(opened.tensor("weights", name))
            continue
        path, _, wanted = name.rpartition(".")
        for parameter_name, parameter, seat_ids in layers[path].expert_parameters():
            for seat, expert in enumerate(seat_ids):
                if parameter_name == wanted and expert in info.experts:
                    parameter[seat].copy_(opened.tensor("weights", name, expert))
    _restore_buffers(opened, model)


@torch.no_grad()
def _restore_buffers(opened: Checkpoint, model: nn.Module) -> None:
    for name, buffer in stored_buffers(model):
        buffer.copy_(opened.tensor(BUFFERS, name))
