"""Bytes that a rank sends in a step, axis by axis.

experts    rows to the experts and back, as `moe.traffic_model` has them, inside and across nodes
tensor     tokens gathered at the entrance of cut blocks and summed at their exit; counted in the trace
sequence   heads exchanged for tokens around attention; counted in the trace
pipeline   hidden states to the next stage, their gradients to the one before
data       gradients summed over replicas, weights gathered from those who updated them

The collectives of the data axis are given by their *payload*, the bytes of the tensor that all ranks have in the end or
give in the beginning. On a ring of r ranks each sends (r − 1)/r of the payload of a gather or a reduce-scatter, and
twice that of an all-reduce (reduce-scatter, then gather).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_dist.planner.timeline import Gathered
from moe_dist.train.memory import FP32, Settings

PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


@dataclass(frozen=True)
class Collective:
    """A step's collectives of one kind over the replicas of one family. payload: bytes in all of them together."""

    kind: str
    family: str
    payload: int

    def sent(self, replicas: int) -> float:
        return PASSES[self.kind] * self.payload * (replicas - 1) / replicas


def data_collectives(settings: Settings, gathered: Gathered, *, micro_batches: int) -> list[Collective]:
    """What the engine sums and gathers in a step, at each ZeRO stage (`train/deepspeed_seam.py`, DeepSpeed 0.19.8).

    Stages 0 and 1 sum the gradients of all micro-batches at once, in fp32, stages 2 and 3 those of each; only stage 3
    sends a rank no more than its part. What the ranks have updated is gathered by all once a step. At stage 3 it is so
    for small weights only; others are gathered when they are used, in the forward of each micro-batch and, where they
    were let go, in the backward.
    """
    found = []
    stage, totals, replicas = settings.stage, settings.totals, settings.replicas
    for family, trained in totals.trained.items():
        if replicas[family] == 1:
            continue
        times = 1 if stage < 2 else micro_batches
        if trained:
            kind = "reduce_scatter" if stage == 3 else "all_reduce"
            found.append(Collective(kind, family, times * FP32 * trained))
            if stage in (1, 2):
                found.append(Collective("all_gather", family, settings.element * trained))
        if stage == 3:
            each = sum(
                whole[family] * (1 + gathered.again(place)) for place, (_, whole, _) in enumerate(gathered.parts)
            )
            once = sum(small[family] for _, _, small in gathered.parts) if trained else 0
            found.append(Collective("all_gather", family, settings.element * (micro_batches * each + once)))
    return found


@dataclass(frozen=True)
class Wire:
    """Bytes that a rank of the stage that sends most sends in a step. data: by family. inside, across: of `experts`."""

    experts_inside: float
    experts_across: float
    tensor: int
    sequence: int
    pipeline: int
    data: Mapping[str, float]

    @property
    def total(self) -> float:
        axes = self.experts_inside + self.experts_across + self.tensor + self.sequence + self.pipeline
        return axes + sum(self.data.values())
