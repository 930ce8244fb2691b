"""What a run would do, without doing it: layout, trainable table and memory, from the configuration alone."""

from __future__ import annotations

from moe_dist.config.checks import accumulation, axes_of, is_local
from moe_dist.config.schema import RunConfig
from moe_dist.models.stages import stage_layers
from moe_dist.parallel.grid import Grid, layout
from moe_dist.train.backends import check_backend
from moe_dist.train.build import ModelPlan, plan_model
from moe_dist.train.memory import Inventory, Settings, inventory, is_tied, of_stage, settings_of, totals
from moe_dist.train.routing import check_routing
from moe_dist.train.table import human_bytes, render


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
        lines.append(f"stages   layers {listed}; memory is that of the stage that needs most")
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


def memory_of(config: RunConfig, plan: ModelPlan, grid: Grid) -> tuple[Settings, int]:
    """What a rank keeps of the pipeline stage that needs most before activations, and which stage that is."""
    settings = {
        "zero_stage": config.parallel.zero_stage,
        "precision": config.train.precision,
        "bucket": config.parallel.reduce_bucket_size,
    }
    found = []
    for stage, held in enumerate(_stages(plan, grid)):
        weights = totals(weight for part in held.values() for weight in part)
        found.append((settings_of(weights, grid, **settings), stage))
    return max(found, key=lambda one: one[0].before_activations_total)


def _stages(plan: ModelPlan, grid: Grid) -> list[Inventory]:
    """What a rank of each pipeline stage holds."""
    parts = inventory(plan.all_stages)
    if grid.pipeline == 1:
        return [parts]
    tied, last = is_tied(plan.all_stages), grid.pipeline - 1
    cuts = enumerate(stage_layers(plan.skeleton, grid.pipeline))
    return [of_stage(parts, layers, first=stage == 0, last=stage == last, tied=tied) for stage, layers in cuts]


def _memory(config: RunConfig, plan: ModelPlan, grid: Grid) -> str:
    kept, stage = memory_of(config, plan, grid)
    listed = ", ".join(f"{name} {human_bytes(value)}" for name, value in kept.before_activations.items() if value)
    whose = f"a rank of stage {stage}" if grid.pipeline > 1 else "a rank"
    return (
        f"memory   {human_bytes(kept.before_activations_total)} {whose} before activations: {listed}\n"
        "         with activations: moe-dist plan CONFIG"
    )
