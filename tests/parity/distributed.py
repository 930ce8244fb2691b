"""The same training on the ranks of a pool, by the code that `moe-dist train` runs."""

from __future__ import annotations

from torch import nn

from moe_dist.config.checks import axes_of
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import build_grid
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.engine import build_engine
from moe_dist.train.losses import count_labels
from moe_dist.train.passes import run_passes
from moe_dist.train.routing import Routing
from moe_dist.train.trainable import layer_index
from tests.parity import problem
from tests.parity.cells import Cell
from tests.train.runner import packed


def train(cell: Cell, folder: str, *, backend: str = "auto") -> dict:
    """On each rank: its part of the logits and expert ids of its rows, the gradients it owns, norms, and the weights it
    owns; `place` says which rows and tokens it has seen.

    backend: `moe.experts_backend`.
    """
    config = problem.config(cell, folder)
    config.moe.experts_backend = backend
    grid = build_grid(**axes_of(config), node_size=cell.node_size)
    model = build_model(config, plan_model(config, grid), grid)
    engine = build_engine(
        model,
        grid,
        zero_stage=cell.stage,
        precision="fp32",
        betas=problem.BETAS,
        eps=problem.EPS,
        weight_decay=problem.DECAY,
        clip_norm=problem.CLIP,
        accumulation_steps=problem.ROWS // cell.data,
        reduce_bucket_size=cell.bucket,
    )
    routing = Routing(model, config.moe, grid)
    heard = _Heard(model, has_head=grid.is_last_stage)
    result: dict = {"norms": [], "losses": []}
    for step, rate in enumerate(problem.RATES):
        rows = [problem.padded(row) for row in problem.rows(step)]
        labels = sum(count_labels(row["labels"]) for row in rows)
        routing.start_step()
        passes = run_passes(engine, routing, rows[grid.data_rank :: grid.data], labels=labels, grid=grid)
        if step == 0:
            result |= {"logits": heard.logits, "ids": heard.ids, "gradients": packed(engine.gradients())}
        result["losses"].append(passes.loss_sum.item() / labels)
        result["norms"].append(engine.step(rate).grad_norm)
        heard.close()
    result["weights"] = packed(engine.fragments("weights"))
    places = ("data_rank", "sequence_rank", "tensor_rank", "slice_rank")
    result["place"] = {name: getattr(grid, name) for name in places}
    engine.close()
    return result


class _Heard:
    """What the forwards of the first step have said, in order of the micro-batches.

    logits: arrays `[M, V]` of one row each, empty on stages without a head. ids: {layer index: arrays `[S, K]`}.
    """

    def __init__(self, model: nn.Module, *, has_head: bool):
        self.logits: list = []
        self.ids: dict[int, list] = {}
        self.layers = [layer for _, layer in moe_layers(model)]
        self.hook = None
        if has_head:
            said = self.logits
            self.hook = model.register_forward_hook(lambda _, __, out: said.append(out.logits[0].detach().numpy()))
        for name, layer in moe_layers(model):
            seen = self.ids.setdefault(layer_index(name), [])
            layer.recorders.append(lambda ids_TK, weights_TK, seen=seen: seen.append(ids_TK.numpy()))

    def close(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        for layer in self.layers:
            layer.recorders.clear()
