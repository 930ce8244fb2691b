"""Scores of the experts of a configured model over a sample of its training data, on all ranks of the launcher."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_dist.checkpoint import fingerprint
from moe_dist.config.expert_files import Summary
from moe_dist.config.schema import RunConfig, TrainableSection
from moe_dist.data.attention import check_packing
from moe_dist.data.fingerprint import digest
from moe_dist.data.loader import TrainData, build_data
from moe_dist.errors import UserError
from moe_dist.methods.esft.score import RoutingScores
from moe_dist.parallel.grid import build_grid
from moe_dist.train.build import ModelPlan, build_model, load_tokenizer, plan_model
from moe_dist.train.loop import to_device
from moe_dist.train.routing import Routing
from moe_dist.train.rows import model_inputs, rank_rows
from moe_dist.train.start import on_rank_zero, start_ranks

SAMPLE_TOKENS = 131_072  # the paper's: 32 sequences of 4,096


@torch.no_grad()
def score_run(
    config: RunConfig,
    *,
    tokens: int = SAMPLE_TOKENS,
    score_norm: str = "per_token",
    count_tokens: str = "no_pad",
) -> Summary:
    """Score the experts of the model as configured (no checkpoint of a run). Collective: every rank calls it.

    tokens: at least so many real tokens are run, in whole rows of the training data, in the order of training, and
    no more than one pass over the data. The sample does not depend on ranks, micro-batch or layout.
    """
    if tokens < 1:
        raise UserError(f"tokens={tokens}: has to be at least 1")
    device = start_ranks()
    grid = build_grid(expert=config.parallel.expert, node_size=config.parallel.node_size, device=device)
    config = replace(config, trainable=TrainableSection())  # what trains is what the scores are to tell
    plan = plan_model(config, grid)
    data = build_data(config.data, load_tokenizer(config, plan), seed=config.run.seed)
    if data.train is None:
        raise UserError("data.train is empty: give the task's training data, by which its experts are scored")
    model = build_model(config, plan, grid).eval()
    if config.data.packing is True:
        check_packing(model.config)
    routing = Routing(model, config.moe, grid)
    rows = _rows_for(data.train, tokens)
    batches = data.train.next_batch(
        rows, rank=grid.data_rank, ranks=grid.data, micro_batch=config.train.micro_batch_size
    )
    with RoutingScores(model, grid, count_tokens=count_tokens) as listener:
        for batch in batches:
            batch = to_device(batch, device)
            part = rank_rows(batch, grid)
            routing.see(part.real_BS)
            listener.see(batch)
            model(**model_inputs(part, model.config, dtype=model.dtype))
    extra = {
        "model": {"name": config.model.path, "fingerprint": on_rank_zero(lambda: _identity(config, plan))},
        "data": {"fingerprint": data.train.sampler.fingerprint, "seed": config.run.seed, "rows": rows},
    }
    return listener.summary(score_norm=score_norm, extra=extra)


def _rows_for(train: TrainData, tokens: int) -> int:
    """How many of the next rows hold `tokens` real tokens, at most all rows there are. The position stays."""
    before, rows, found = train.state_dict(), 0, 0
    while found < tokens and (train.rows is None or rows < train.rows):
        (row,) = train.next_batch(1)
        rows, found = rows + 1, found + int(row["attention_mask"].sum())
    train.load_state_dict(before)
    return rows


def _identity(config: RunConfig, plan: ModelPlan) -> str:
    if plan.folder is not None:
        return fingerprint(plan.folder)
    return "config:" + digest([config.model.config, config.model.seed])
