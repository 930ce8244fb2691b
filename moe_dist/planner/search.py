"""The layouts of a cluster, the fastest that fit first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from moe_dist.config.schema import RunConfig
from moe_dist.planner.anatomy import Layout
from moe_dist.planner.hardware import Cluster
from moe_dist.planner.speed import Clock, Speed
from moe_dist.planner.study import Study
from moe_dist.planner.timeline import Peak
from moe_dist.planner.wire import Wire

UNDIVIDED = "rows or micro-batches do not divide"
UNSEATED = "the expert size does not divide the ranks of a stage"
MICRO_BATCHES = (1, 2, 4, 8)  # rows at once; with more of them products gain no more, and memory is gone
MOST_TRACED = 60  # layouts whose memory is followed to the end; what is slower than those found is not looked at


@dataclass(frozen=True)
class Found:
    layout: Layout
    speed: Speed
    wire: Wire
    memory: Peak


@dataclass(frozen=True)
class Ranking:
    """best: the fastest that fit, in order. left_out: reason -> how many layouts. looked_at: how many were formed."""

    best: list[Found]
    left_out: Counter
    looked_at: int


def layout_of(config: RunConfig, world: int, *, node_size: int = 8) -> Layout:
    """The layout that a configuration asks for on `world` ranks."""
    from moe_dist.config.checks import accumulation, axes_of

    return Layout(
        world,
        **axes_of(config),
        zero_stage=config.parallel.zero_stage,
        recompute=config.train.recompute,
        micro_batch=config.train.micro_batch_size,
        micro_batches=accumulation(config, world),
        node_size=config.parallel.node_size or node_size,
    )


def evaluate(study: Study, plan: Layout, cluster: Cluster) -> Found:
    speed, wire = Clock(study, cluster).estimate(plan)
    return Found(plan, speed, wire, study.memory(plan))


def rank(study: Study, cluster: Cluster, *, sequences: int, wanted: int = 10) -> Ranking:
    """The fastest layouts of all GPUs of the cluster for steps of `sequences` rows."""
    clock = Clock(study, cluster)
    left_out: Counter = Counter()
    timed: list[tuple[float, Layout, Speed, Wire]] = []
    looked_at = 0
    for plan in layouts(study, cluster, sequences, left_out):
        looked_at += 1
        refusal = study.refusal(plan.tensor, plan.sequence, plan.pipeline)
        if refusal:
            left_out[refusal] += 1
        elif _least(study, plan) > cluster.room:
            left_out["weights, gradients and optimizer alone are more than the memory"] += 1
        else:
            speed, wire = clock.estimate(plan)
            timed.append((speed.step, plan, speed, wire))
    # Of layouts that take equally long the one that shares less comes first.
    timed.sort(key=lambda one: (round(one[0], 9), one[1].zero_stage, one[1].pipeline, one[1].tensor, one[1].sequence))
    best: list[Found] = []
    followed = 0
    for index, (_, plan, speed, wire) in enumerate(timed):
        if len(best) == wanted or followed == MOST_TRACED:
            left_out["slower than those shown, not followed further"] += len(timed) - index
            break
        if _kept_at_least(study, plan) > cluster.room:
            left_out["activations are more than the memory leaves"] += 1
            continue
        followed += 1
        memory = study.memory(plan)
        if memory.total > cluster.room:
            left_out["activations are more than the memory leaves"] += 1
        else:
            best.append(Found(plan, speed, wire, memory))
    return Ranking(best, left_out, looked_at + left_out[UNDIVIDED] + left_out[UNSEATED])


def layouts(study: Study, cluster: Cluster, sequences: int, left_out: Counter) -> Iterator[Layout]:
    """All that the numbers allow. Tensor groups stay inside a node; an expert is not cut, nor is a layer."""
    world, length = cluster.gpus, study.config.data.seq_len
    experts = max(study.experts_of_layers, default=0)
    for pipeline in _divisors(world):
        if pipeline > len(study.layers):
            continue
        stage = world // pipeline
        for tensor in (size for size in _divisors(stage) if size <= cluster.node_size):
            for sequence in (size for size in _divisors(stage // tensor) if size <= 2 * cluster.node_size):
                data = stage // (tensor * sequence)
                fitting = [rows for rows in MICRO_BATCHES if sequences % (data * rows) == 0]
                if length % (tensor * sequence) or not fitting:
                    left_out[UNDIVIDED] += 1
                    continue
                for expert in (size for size in _divisors(world) if size <= max(experts, 1)):
                    if stage % expert:
                        left_out[UNSEATED] += 1
                        continue
                    for micro_batch, recompute, zero_stage in product(fitting, (False, True), (0, 1, 2, 3)):
                        yield Layout(
                            world,
                            pipeline,
                            sequence,
                            tensor,
                            expert,
                            zero_stage,
                            recompute,
                            micro_batch,
                            sequences // (data * micro_batch),
                            cluster.node_size,
                        )


def _least(study: Study, plan: Layout) -> int:
    """What a step takes before activations on the stage that needs most."""
    stages = study.unlike_stages(plan.pipeline)
    return max(study.settings(plan, stage).before_activations_total for stage in stages)


def _kept_at_least(study: Study, plan: Layout) -> int:
    """The same with what the forwards under way keep, of tokens that need not travel."""
    trace = study.trace(plan.tensor, plan.sequence, 1, plan.micro_batch, plan.recompute, 1)
    most = 0
    for stage, layers in enumerate(study.stages(plan.pipeline)):
        kept = sum(trace.forward[study.kind_of[index]][-1].end for index in layers)
        flight = min(plan.pipeline - stage, plan.micro_batches)
        settings = study.settings(plan, stage)
        # Where all forwards come before the first backward, gradients come as activations go.
        beside = settings.before_activations_total if plan.micro_batches > flight else settings.resident
        most = max(most, beside + flight * kept)
    return most


def _divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]
