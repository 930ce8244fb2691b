"""The same training on the ranks of a pool, by the code that `moe-dist train` runs."""

from __future__ import annotations

import torch

from moe_dist.data.attention import model_inputs
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import build_grid
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.engine import build_engine
from moe_dist.train.losses import count_labels, label_loss_sum
from moe_dist.train.routing import Routing
from tests.parity import problem
from tests.parity.cells import Cell
from tests.train.runner import packed


def train(cell: Cell, folder: str, *, backend: str = "auto") -> dict:
    """On each rank: logits and expert ids of its rows, the gradients it owns, norms, and the weights it owns.

    backend: `moe.experts_backend`.
    """
    config = problem.config(cell, folder)
    config.moe.experts_backend = backend
    grid = build_grid(expert=cell.expert, node_size=cell.node_size)
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
        accumulation_steps=problem.ROWS // cell.world,
        reduce_bucket_size=cell.bucket,
    )
    routing = Routing(model, config.moe, grid)
    chosen: list[torch.Tensor] = []
    for _, layer in moe_layers(model):
        layer.recorders.append(lambda ids_TK, weights_TK: chosen.append(ids_TK))
    result: dict = {"norms": [], "logits": [], "ids": []}
    for step, rate in enumerate(problem.RATES):
        rows = problem.rows(step)
        batches = [problem.padded(row) for row in rows]
        labels = sum(count_labels(batch["labels"]) for batch in batches)
        routing.start_step()
        for index in range(grid.rank, problem.ROWS, grid.world):
            batch, length = batches[index], len(rows[index]["input_ids"])
            routing.see(batch)
            chosen.clear()
            with routing.listening():
                logits = engine.forward(**model_inputs(batch, model.config)).logits
            share = routing.loss_share(batch) / engine.accumulation_steps
            engine.backward(label_loss_sum(logits, batch["labels"]) / labels + share)
            if step == 0:
                result["logits"].append(logits[0, :length].detach().numpy())
                result["ids"].append([ids_TK[:length].numpy() for ids_TK in chosen])
        if step == 0:
            result["gradients"] = packed(engine.gradients())
        result["norms"].append(engine.step(rate).grad_norm)
    result["weights"] = packed(engine.fragments("weights"))
    engine.close()
    return result
