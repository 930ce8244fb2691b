"""How long a step takes, estimated: what is counted, divided by what the cluster is assumed to reach.

    micro-batch of a stage   operations / (peak · achieved) + bytes of the axes / (link · moved), one after the other
    passes                   (micro-batches + stages − 1) · the slowest stage's micro-batch: 1F1B's bubble
    data                     bytes of gradients and weights / (link · moved), after the passes
    update                   masters, moments and gradients read and written once, at the memory's rate

Nothing is taken to overlap, and every expert to be used alike: real runs win by the first, and lose by the second.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_dist.planner.hardware import Cluster
from moe_dist.planner.study import Layout, Study
from moe_dist.planner.wire import Wire


@dataclass(frozen=True)
class Speed:
    """Seconds of a step: arithmetic of the slowest stage, its exchanges by axis, the bubble, data, update."""

    arithmetic: float
    experts: float
    tensor: float
    sequence: float
    pipeline: float
    bubble: float
    data: float
    update: float

    @property
    def step(self) -> float:
        return sum(vars(self).values())


def estimate(study: Study, plan: Layout, cluster: Cluster) -> tuple[Speed, Wire]:
    """(seconds of a step, bytes that a rank of the slowest stage sends in it)."""
    peak_rate = (cluster.gpu.bf16 if study.bf16 else cluster.gpu.fp32) * cluster.achieved
    slowest = None
    for stage in range(plan.pipeline):
        wire, times = study.wire(plan, stage), plan.micro_batches
        parts = {
            "arithmetic": times * study.work(plan, stage) / peak_rate,
            "experts": wire.experts_inside / (cluster.gpu.inside * cluster.moved)
            + wire.experts_across / (cluster.gpu.across * cluster.moved),
            "tensor": wire.tensor / cluster.rate(plan.tensor),
            "sequence": wire.sequence / cluster.rate(plan.sequence, plan.tensor),
            "pipeline": wire.pipeline / cluster.rate(plan.world),
        }
        if slowest is None or sum(parts.values()) > sum(slowest[0].values()):
            slowest = parts, wire, stage
    parts, wire, stage = slowest
    settings = study.settings(plan, stage)
    strides = {"dense": 1, "tensor": plan.tensor, "expert": plan.expert}
    data = sum(sent / cluster.rate(settings.replicas[family], strides[family]) for family, sent in wire.data.items())
    # Masters, both moments and the gradient are read; all but the gradient are written.
    update = 7 * 4 * settings.owned / cluster.gpu.memory_rate
    bubble = sum(parts.values()) * (plan.pipeline - 1) / plan.micro_batches
    return Speed(**parts, bubble=bubble, data=data, update=update), wire
