"""A model under study: the memory, operations and bytes of a rank of any layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from moe_dist.errors import UserError
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.traffic_model import Group, expected_flows, step_bytes
from moe_dist.parallel.grid import Grid, layout
from moe_dist.planner.anatomy import Anatomy, Layout
from moe_dist.planner.shadow import Leg, Rows
from moe_dist.planner.timeline import Course, Gathered, Peak, peak
from moe_dist.planner.trace import Trace, follow
from moe_dist.planner.wire import Collective, Wire, data_collectives
from moe_dist.train.memory import Inventory


class Study(Anatomy):
    """How a step of the model goes in a layout."""

    @cache  # noqa: B019
    def trace(
        self, tensor: int, sequence: int, expert: int, micro_batch: int, recompute: bool, node_size: int
    ) -> Trace:
        model = self.part(tensor, sequence, expert, recompute)
        grid = layout(np.lcm(tensor * sequence, expert).item(), tensor=tensor, sequence=sequence, expert=expert)
        grid = replace(grid, node_size=node_size)
        tokens = micro_batch * self.config.data.seq_len // grid.slices
        return follow(
            model,
            grid,
            batch=micro_batch,
            length=self.config.data.seq_len,
            rows_of=lambda experts: self.rows(experts, tokens, grid),
            layers=set(self.kind_of),
            masked=self.packed,
            device=self.device,
        )

    def dispatcher(self, grid: Grid) -> str:
        """What `moe.dispatcher` stands for, without groups (see `moe.dispatch.choose_dispatcher`)."""
        wish = self.config.moe.dispatcher
        whole_nodes = grid.expert > grid.node_size and grid.expert % grid.node_size == 0
        if wish == "node" and not whole_nodes:
            raise UserError(
                f"moe.dispatcher=node: parallel.expert={grid.expert} does not fill nodes of {grid.node_size}"
            )
        if wish != "auto":
            return wish
        if whole_nodes and grid.node_size > 1:
            return "node"
        return "dedup" if self.top_k() > 1 else "alltoall"

    @cache  # noqa: B019
    def _flows(self, experts: int, expert: int, dispatcher: str, node_size: int) -> tuple[Group, list[np.ndarray]]:
        group = Group.even(expert, experts=experts, node_size=min(node_size, expert))
        return group, expected_flows(dispatcher, group, top_k=self.top_k())

    def rows(self, layer: MoEExperts, tokens: int, grid: Grid) -> Rows:
        """The rows of a rank of `tokens` tokens where every expert is used alike."""
        slots = tokens * self.top_k() * grid.expert / layer.spec.num_experts  # rows of an expert
        spans = tuple(round(slots * span.held) for span in layer.spans())
        if grid.expert == 1:
            return Rows((), spans)
        node = self._nodes(grid)
        _, flows = self._flows(layer.spec.num_experts, grid.expert, self.dispatcher(grid), node)
        legs = tuple(Leg(round(flow[0].sum() * tokens), round(flow[:, 0].sum() * tokens)) for flow in flows)
        return Rows(legs, spans)

    def _nodes(self, grid: Grid) -> int:
        """Ranks of an expert group that share a node."""
        size = min(grid.node_size, grid.expert)
        return size if grid.expert % size == 0 else 1

    # Memory

    def _stage(self, plan: Layout, stage: int) -> tuple[Course, Inventory]:
        """The parts of a stage, each layer by the name of its kind, and the weights by the same names."""
        layers = self.stages(plan.pipeline)[stage]
        course = Course([self.kind_of[index] for index in layers], stage == 0, stage == plan.pipeline - 1)
        return course, self.inventory(plan.tensor, plan.sequence, plan.expert)

    def memory(self, plan: Layout) -> Peak:
        """The largest peak over the stages."""
        trace = self.trace(plan.tensor, plan.sequence, plan.expert, plan.micro_batch, plan.recompute, plan.node_size)
        found = []
        for stage in range(plan.pipeline):
            course, weights = self._stage(plan, stage)
            # 1F1B; with fewer micro-batches than stages all forwards come first (train/pipeline.py).
            flight = plan.pipeline - stage if plan.micro_batches >= plan.pipeline else plan.micro_batches
            found.append(
                peak(
                    trace,
                    course,
                    weights,
                    self.settings(plan, stage),
                    micro_batches=plan.micro_batches,
                    in_flight=flight,
                )
            )
        return max(found, key=lambda one: one.total)

    # Work and bytes on the wire, of a step

    def work(self, plan: Layout, stage: int) -> int:
        """Floating-point operations of a micro-batch on a rank of that stage, forward, backward and recomputation."""
        return plan.micro_batch * (self.counted(plan, stage)["flops"] + self.counted(plan, stage)["expert flops"])

    def counted(self, plan: Layout, stage: int) -> Counter:
        """The trace's totals over that stage, of a micro-batch of one row: operations and bytes grow with its rows,
        kernels and exchanges do not."""
        return self._counted(plan.tensor, plan.sequence, plan.recompute, plan.pipeline, stage)

    @cache  # noqa: B019
    def _counted(self, tensor: int, sequence: int, recompute: bool, pipeline: int, stage: int) -> Counter:
        found: Counter = Counter()
        for name, times in self.parts(pipeline, stage).items():
            for what, size in self.row(tensor, sequence, recompute)[name].items():
                found[what] += times * size
        return found

    def row(self, tensor: int, sequence: int, recompute: bool) -> Mapping[str | int, Mapping[str, int]]:
        """The trace's totals, part by part, of a micro-batch of one row."""
        # What does not travel to experts is the same whatever ranks they are on: the trace of one is taken.
        return self.trace(tensor, sequence, 1, 1, recompute, 1).totals

    @cache  # noqa: B019
    def read(self, tensor: int, sequence: int, expert: int, recompute: bool, name: str | int) -> tuple[int, int]:
        """Bytes of weights that the products of a part read in a micro-batch: of experts, of all others.

        A weight is read by the forward, by the gradient of what came in, and its own gradient, as large, is written;
        a recomputation reads it once more. The embedding is looked up, and is in no product.
        """
        element = 2 if self.bf16 else 4
        sizes = {True: 0, False: 0}
        weights = () if name == "embedding" else self.inventory(tensor, sequence, expert).get(name, ())
        for weight in weights:
            passes = 2 + weight.trained + (recompute and name != "head")
            sizes[weight.family == "expert"] += passes * element * weight.elements
        return sizes[True], sizes[False]

    def hops(self, plan: Layout) -> list[tuple[int, int]]:
        """(ranks, ranks between neighbours) of each group that a token crosses on its way to its experts."""
        if plan.expert == 1 or not any(self.experts_of_layers):
            return []
        node = self._nodes(plan.grid)
        if self.dispatcher(plan.grid) == "node":
            return [(plan.expert // node, node), (node, 1)]
        return [(plan.expert, 1)]

    def wire(self, plan: Layout, stage: int) -> Wire:
        """What a rank of that stage sends in a step."""
        grid, times = plan.grid, plan.micro_batches
        inside = across = 0.0
        tokens = plan.micro_batch * self.config.data.seq_len // grid.slices
        layers = Counter(self.experts_of_layers[index] for index in self.stages(plan.pipeline)[stage])
        for experts, count in layers.items():
            sent = self._experts_sent(experts, plan.expert, tokens, plan.node_size)
            inside, across = inside + times * count * sent[0], across + times * count * sent[1]
        hidden = self.hidden * plan.micro_batch * self.config.data.seq_len // grid.slices * (2 if self.bf16 else 4)
        neighbours = (stage > 0) + (stage < plan.pipeline - 1)
        settings = self.settings(plan, stage)
        data: dict[str, float] = {}
        for one in self.collectives(plan, stage):
            data[one.family] = data.get(one.family, 0.0) + one.sent(settings.replicas[one.family])
        return Wire(
            experts_inside=inside,
            experts_across=across,
            tensor=times * plan.micro_batch * self.counted(plan, stage)["tensor"],
            sequence=times * plan.micro_batch * self.counted(plan, stage)["sequence"],
            pipeline=times * neighbours * hidden,
            data=data,
        )

    def collectives(self, plan: Layout, stage: int) -> list[Collective]:
        """What the engine of a rank of that stage sums and gathers in a step."""
        settings = self.settings(plan, stage)
        gathered = Gathered(*self._stage(plan, stage), settings)
        return data_collectives(settings, gathered, micro_batches=plan.micro_batches)

    @cache  # noqa: B019
    def _experts_sent(self, experts: int, expert: int, tokens: int, node_size: int) -> tuple[float, float]:
        """Bytes inside and across nodes that a rank of `tokens` tokens sends for a layer, there and back twice."""
        if expert == 1 or not experts:
            return 0.0, 0.0
        grid = replace(layout(expert, expert=expert), node_size=node_size)
        dispatcher = self.dispatcher(grid)
        group, flows = self._flows(experts, expert, dispatcher, self._nodes(grid))
        element = 2 if self.bf16 else 4
        back = 4 if self.config.moe.wire == "float32" else element
        sent = step_bytes(
            dispatcher,
            [flow * tokens for flow in flows],
            group,
            hidden=self.hidden,
            top_k=self.top_k(),
            row_bytes=element,
            back_bytes=back,
            chunks=self.config.moe.chunks,
        )
        return sent.inside / expert, sent.across / expert
