"""How long a step takes, estimated: what is counted, divided by what the cluster is assumed to reach.

    part of a model          the larger of what its kernels take and what the host takes to launch them; its products
                             max(operations / (peak · achieved), bytes of weights / memory's rate), of experts and of
                             all others apart: an expert with few rows takes as long as reading its weights
    micro-batch of a stage   its parts + exchanges · latency + bytes of the axes / (link · moved), one after the other
    passes                   (micro-batches + stages − 1) · the slowest stage's micro-batch: 1F1B's bubble
    data                     exchanges · latency + bytes of gradients and weights / (link · moved), after the passes
    update                   masters, moments and gradients read and written once, at the memory's rate

That the host runs ahead of the GPU within a part and not beyond has a reason: at each experts layer it waits for the
counts of the rows. Nothing else is taken to overlap, and every expert to be used alike: real runs win by the first, and
lose by the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from moe_dist.planner.anatomy import Layout
from moe_dist.planner.hardware import Cluster
from moe_dist.planner.study import Study
from moe_dist.planner.wire import Wire

# Of a hop in a forward and its backward (moe/hop.py): counts, slots, rows, rows back; rows, rows back, scalars back.
HOP_EXCHANGES = 7


@dataclass(frozen=True)
class Speed:
    """Seconds of a step: the slowest stage's parts, its exchanges by axis, the bubble, data, update. latency: of all
    exchanges but those of data, which are in `data`."""

    arithmetic: float
    experts: float
    tensor: float
    sequence: float
    pipeline: float
    latency: float
    bubble: float
    data: float
    update: float

    @property
    def step(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Part:
    """What a part of a model does in a micro-batch: operations, bytes of weights, of experts and others; kernels."""

    flops: float
    weights: float
    expert_flops: float
    expert_weights: float
    kernels: int


def part_seconds(part: Part, cluster: Cluster, *, bf16: bool) -> float:
    rate = (cluster.gpu.bf16 if bf16 else cluster.gpu.fp32) * cluster.achieved
    experts = max(part.expert_flops / rate, part.expert_weights / cluster.gpu.memory_rate)
    others = max(part.flops / rate, part.weights / cluster.gpu.memory_rate)
    return max(experts + others, part.kernels * cluster.launch)


class Clock:
    """Estimates layouts of one model on one cluster."""

    def __init__(self, study: Study, cluster: Cluster):
        self.study, self.cluster = study, cluster

    def estimate(self, plan: Layout) -> tuple[Speed, Wire]:
        """(seconds of a step, bytes that a rank of the slowest stage sends in it)."""
        study, cluster = self.study, self.cluster
        slowest = None
        for stage in study.unlike_stages(plan.pipeline):
            wire = study.wire(plan, stage)
            seconds = {
                "arithmetic": plan.micro_batches * self.arithmetic(plan, stage),
                "experts": wire.experts_inside / (cluster.gpu.inside * cluster.moved)
                + wire.experts_across / (cluster.gpu.across * cluster.moved),
                "tensor": wire.tensor / cluster.rate(plan.tensor),
                "sequence": wire.sequence / cluster.rate(plan.sequence, plan.tensor),
                "pipeline": wire.pipeline / cluster.rate(plan.world),
                "latency": plan.micro_batches * self.latency(plan, stage),
            }
            if slowest is None or sum(seconds.values()) > sum(slowest[0].values()):
                slowest = seconds, wire, stage
        seconds, wire, stage = slowest
        # Masters, both moments and the gradient are read; all but the gradient are written.
        update = 7 * 4 * study.settings(plan, stage).owned / cluster.gpu.memory_rate
        bubble = sum(seconds.values()) * (plan.pipeline - 1) / plan.micro_batches
        return Speed(**seconds, bubble=bubble, data=self._data(plan, stage, wire), update=update), wire

    def arithmetic(self, plan: Layout, stage: int) -> float:
        """Seconds of a micro-batch's kernels on a rank of that stage."""
        sizes = plan.tensor, plan.sequence, plan.expert, plan.micro_batch, plan.recompute
        return sum(times * self._part(*sizes, name) for name, times in self.study.parts(plan.pipeline, stage).items())

    @cache  # noqa: B019 - a clock lives as long as its cache
    def _part(
        self, tensor: int, sequence: int, expert: int, micro_batch: int, recompute: bool, name: str | int
    ) -> float:
        counted = self.study.row(tensor, sequence, recompute)[name]
        expert_weights, weights = self.study.read(tensor, sequence, expert, recompute, name)
        flops, expert_flops = (micro_batch * counted.get(what, 0) for what in ("flops", "expert flops"))
        part = Part(flops, weights, expert_flops, expert_weights, counted["kernels"])
        return part_seconds(part, self.cluster, bf16=self.study.bf16)

    def latency(self, plan: Layout, stage: int) -> float:
        """Seconds of a micro-batch's exchanges on a rank of that stage, if they were of nothing."""
        study, latency = self.study, self.cluster.latency
        counted = study.counted(plan, stage)
        of_layer = HOP_EXCHANGES * study.config.moe.chunks * sum(latency(*hop) for hop in study.hops(plan))
        neighbours = (stage > 0) + (stage < plan.pipeline - 1)
        return (
            counted["tensor exchanges"] * latency(plan.tensor)
            + counted["sequence exchanges"] * latency(plan.sequence, plan.tensor)
            + study.experts_in(plan, stage) * of_layer
            + neighbours * latency(2, plan.world // plan.pipeline)
        )

    def _data(self, plan: Layout, stage: int, wire: Wire) -> float:
        settings = self.study.settings(plan, stage)
        strides = {"dense": 1, "tensor": plan.tensor, "expert": plan.expert}
        groups = {family: (settings.replicas[family], stride) for family, stride in strides.items()}
        seconds = sum(sent / self.cluster.rate(*groups[family]) for family, sent in wire.data.items())
        for one in self.study.collectives(plan, stage):
            # A bucket at a time; ZeRO 3 gathers layer by layer, in the forward and in the backward.
            exchanges = -(-one.payload // (4 * settings.bucket_elements))
            if plan.zero_stage == 3 and one.kind == "all_gather":
                layers = len(self.study.stages(plan.pipeline)[stage])
                exchanges = max(exchanges, 2 * layers * plan.micro_batches)
            seconds += exchanges * self.cluster.latency(*groups[one.family])
        return seconds
