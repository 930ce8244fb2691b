"""The adapter of a finished run, straight from its checkpoint: one tensor at a time, no model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_dist import checkpoint
from moe_dist.checkpoint import Checkpoint
from moe_dist.config.load import load
from moe_dist.config.strict_json import read_json
from moe_dist.errors import UserError
from moe_dist.methods.esft.adapter_folder import Base
from moe_dist.methods.esft.adapter_names import AdapterNames, Contents, ExpertTensor
from moe_dist.methods.esft.adapter_save import Piece, write_adapter
from moe_dist.models.families import our_name
from moe_dist.models.folder import open_weights
from moe_dist.models.loading import parse_dtype
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.train import run_folder, state
from moe_dist.train.build import ModelPlan, load_tokenizer, plan_model
from moe_dist.train.finished import chosen_checkpoint, run_of
from moe_dist.train.trainable import layer_index


def adapter_of_run(source: str | Path, out: str | Path, *, selection: str | Path | None = None) -> tuple[Path, int]:
    """Write what a run has trained as an adapter. One process, whatever number of ranks the run had.

    source: a run folder (see `chosen_checkpoint`) or one of its checkpoints. selection: the NAME.selection.json that
    `esft select` wrote beside the expert config, for the manifest. The fp32 masters are rounded once to the dtype in
    which the run keeps its model. Returns the folder and the checkpoint's step. Raises UserError where the run started
    from random weights, or where its base model is no longer the one that it was trained on.
    """
    run = run_of(Path(source))
    config = load(run / run_folder.CONFIG, paths=False)
    plan = plan_model(config, Grid.single())
    if plan.folder is None:
        raise UserError(f"{run}: the run started from random weights: an adapter needs a base model, model.path")
    dtype = parse_dtype(config.model.dtype) if config.model.dtype else open_weights(plan.folder).main_dtype()
    names = AdapterNames(plan.skeleton.config, dtype, type(plan.skeleton))
    with checkpoint.open_checkpoint(chosen_checkpoint(source), verify="full") as opened:
        contents = _contents(plan, names, config.trainable.experts or {}, buffers=config.moe.expert_bias_rate > 0)
        record = {"run": config.run.name, "step": opened.step, "selection": _how(selection, contents)}
        base = Base(plan.folder)
        if opened.frozen is not None:
            opened.check_base(plan.folder)
        write_adapter(
            Path(out),
            names,
            contents,
            _pieces(opened, plan, names, contents),
            grid=Grid.single(),
            dtype_of=names.dtype,
            base=base,
            tokenizer=load_tokenizer(config, plan),
            record=record,
        )
        return Path(out), opened.step


def _contents(plan: ModelPlan, names: AdapterNames, order: dict[str, list[int]], *, buffers: bool) -> Contents:
    """What the run has trained; experts in the order in which they were selected."""
    experts = {}
    for name, ids in plan.selection.experts.items():
        if ids:
            index = str(layer_index(name))
            experts[index] = list(order[index]) if set(order.get(index, ())) == set(ids) else sorted(ids)
    trained = set(plan.selection.names)
    if buffers:
        trained |= {name for name, _ in state.stored_buffers(plan.skeleton)}
    stock = [name for group in names.plan.dense for name in group.names()]
    return Contents(experts, tuple(name for name in stock if our_name(name, names.descriptions) in trained))


def _pieces(opened: Checkpoint, plan: ModelPlan, names: AdapterNames, contents: Contents) -> Iterator[list[Piece]]:
    for group in names.dense_groups(contents.dense):
        tensors = {}
        for name in group.names():
            own = our_name(name, names.descriptions)
            if own not in opened.catalogue:
                raise UserError(f"{name} did not train, but goes to one tensor on disk with {group.first_target}")
            kind = state.BUFFERS if state.BUFFERS in opened.catalogue[own].kinds else "weights"
            tensors[name] = opened.tensor(kind, own).to(names.dtype(name))
        yield list(names.plan.convert(group, tensors, names.skeleton).items())
    for path, layer in moe_layers(plan.skeleton):
        for expert in contents.experts.get(str(layer_index(path)), ()):
            for parameter in layer.spec.shapes():
                stock = layer.origin.stock_name(parameter)
                value = opened.tensor("weights", f"{path}.{parameter}", expert).to(names.dtype(stock))
                yield names.split(ExpertTensor(stock, expert), layer.origin.turn(value))


def _how(path: str | Path | None, contents: Contents) -> dict | None:
    """The record of a selection, which has to be the one that was trained."""
    if path is None:
        return None
    record = read_json(path)
    try:
        counts = {layer: figures["selected"] for layer, figures in record["layers"].items() if figures["selected"]}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no NAME.selection.json of `moe-dist esft select`") from None
    if counts != {layer: len(ids) for layer, ids in contents.experts.items()}:
        raise UserError(f"{path} is of another selection than the run has trained: other numbers of experts")
    return record
