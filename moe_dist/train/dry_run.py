"""What a run would do, without doing it: layout, trainable table and memory, from the configuration alone."""

from __future__ import annotations

from moe_dist.config.checks import accumulation, axes_of, is_local
from moe_dist.config.schema import RunConfig
from moe_dist.models.stages import stage_layers
from moe_dist.parallel.grid import Grid, layout
from moe_dist.train.backends import check_backend
from moe_dist.train.build import ModelPlan, plan_model
from moe_dist.train.routing import check_routing
from moe_dist.train.table import Row, human_bytes, optimizer_bytes, render, rows, shared


def describe(config: RunConfig, world_size: int) -> str:
    """The text of `--dry-run` for that many ranks. Needs no weights, data, network or GPU.

    A model that is a hub name and not in the local cache is the one thing that cannot be looked at: the layout is
    printed all the same, and the text says what is left open. Raises UserError for a configuration that cannot run.
    """
    grid = layout(world_size, **axes_of(config))
    lines = [_layout(config, grid)]
    if config.model.path is not None and not is_local(config.model.path):
        lines.append(f"model {config.model.path} is on the hub: its layers and memory are known once it is downloaded")
        return "\n\n".join(lines)
    plan = plan_model(config, grid)
    check_backend(config, plan.skeleton)
    check_routing(config.moe, plan.skeleton)
    if grid.pipeline > 1:
        cuts = stage_layers(plan.skeleton, grid.pipeline)
        listed = " | ".join(f"{layers.start}-{layers.stop - 1}" for layers in cuts)
        lines.append(f"stages   layers {listed}; memory is that of the first stage")
    settings = {"zero_stage": config.parallel.zero_stage, "precision": config.train.precision}
    lines.append(render(plan.all_stages, plan.selection, grid, **settings))
    lines.append(_memory(config, plan, grid))
    return "\n\n".join(lines)


def _layout(config: RunConfig, grid: Grid) -> str:
    train = config.train
    micro_batches = accumulation(config, grid.world)
    batch = micro_batches * train.micro_batch_size * grid.data
    tokens = batch * config.data.seq_len
    return "\n".join(
        [
            f"run      {config.run.name} in {config.run.dir}",
            f"ranks    {_ranks(grid)}, ZeRO {config.parallel.zero_stage}, {train.precision}",
            f"step     {batch} sequences of {config.data.seq_len} = at most {tokens:,} tokens: {grid.data} ranks x "
            f"{micro_batches} micro-batches x {train.micro_batch_size}",
            f"course   {train.steps} steps, {train.schedule}, peak lr {train.lr:g}, {train.warmup_steps} of warm-up, "
            f"at most {train.steps * tokens:,} tokens",
            f"data     {', '.join(source.name for source in config.data.train) or 'none'}; "
            f"held out: {', '.join(source.name for source in config.data.eval) or 'none'}",
        ]
    )


def _ranks(grid: Grid) -> str:
    folded = f"expert-data {grid.expert_data} x expert {grid.expert}"
    if grid.pipeline * grid.slices == 1:
        return f"{grid.world} = {folded}"
    axes = " x ".join(f"{name} {getattr(grid, name)}" for name in ("pipeline", "data", "sequence", "tensor"))
    return f"{grid.world} = {axes}; each stage's {grid.stage_size} folded as {folded}"


def memory_parts(config: RunConfig, plan: ModelPlan, grid: Grid) -> dict[str, int]:
    """Bytes of one rank that do not depend on the data: weights, gradients, optimizer, ZeRO's buffers.

    Gradients are fp32 for what trains. From ZeRO 2 on they are shared by the ranks that hold the same weights, at
    ZeRO 3 the weights are too.
    """
    zero_stage, precision = config.parallel.zero_stage, config.train.precision
    total = Row()
    for row in rows(plan.local, plan.selection).values():
        for name in ("dense", "dense_trained", "cut", "cut_trained", "expert", "expert_trained"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
    held, trained = total.dense + total.expert, total.dense_trained + total.expert_trained
    if zero_stage == 3:
        held = shared(total.dense, total.cut, total.expert, grid)
    reduced = trained
    if zero_stage >= 2:
        reduced = shared(total.dense_trained, total.cut_trained, total.expert_trained, grid)
    weights, gradients = (2 if precision == "bf16" else 4) * held, 4 * reduced
    optimizer = optimizer_bytes(total, grid, zero_stage=zero_stage, precision=precision)
    buffers = 4 * min(config.parallel.reduce_bucket_size, trained) if zero_stage else 0
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "reduction buffer": buffers}


def _memory(config: RunConfig, plan: ModelPlan, grid: Grid) -> str:
    parts = memory_parts(config, plan, grid)
    listed = ", ".join(f"{name} {human_bytes(value)}" for name, value in parts.items())
    return f"memory   {human_bytes(sum(parts.values()))} a rank before activations: {listed}"
