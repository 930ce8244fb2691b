"""A model under study: what a rank of any layout holds, computes, keeps and sends, from one look at the model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
from torch import nn

from moe_dist.config.schema import RunConfig
from moe_dist.errors import UserError
from moe_dist.models.cut import cut
from moe_dist.models.recompute import enable_recompute
from moe_dist.models.stages import PassThrough, stage_layers
from moe_dist.models.surgery import moe_layers
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import Placement, balance, contiguous, from_lists
from moe_dist.moe.traffic_model import Group, expected_flows, step_bytes
from moe_dist.parallel.grid import Grid, layout
from moe_dist.planner.shadow import Leg, Rows
from moe_dist.planner.timeline import Course, Gathered, Peak, peak
from moe_dist.planner.trace import Trace, decoder_layers, follow
from moe_dist.planner.wire import Collective, Wire, data_collectives
from moe_dist.train.build import plan_model
from moe_dist.train.engine import DTYPES, cast_parameters
from moe_dist.train.memory import Inventory, Settings, Totals, inventory, is_tied, of_stage, settings_of, totals


@dataclass(frozen=True)
class Layout:
    """How ranks share the work: sizes of the axes, and what a rank does with its part."""

    world: int
    pipeline: int = 1
    sequence: int = 1
    tensor: int = 1
    expert: int = 1
    zero_stage: int = 1
    recompute: bool = False
    micro_batch: int = 1
    micro_batches: int = 1
    node_size: int = 8

    @property
    def grid(self) -> Grid:
        sizes = {name: getattr(self, name) for name in ("pipeline", "sequence", "tensor", "expert")}
        return replace(layout(self.world, **sizes), node_size=self.node_size)

    @property
    def data(self) -> int:
        return self.world // (self.pipeline * self.sequence * self.tensor)


class Study:
    """device: "cuda" or "cpu", where the model would run: which attention and AdamW it gets there."""

    def __init__(self, config: RunConfig, *, device: str = "cuda"):
        self.config, self.device = config, device
        self.bf16 = config.train.precision == "bf16"
        plan = plan_model(config, Grid.single())
        self.skeleton, self.selection = plan.skeleton, plan.selection
        cast_parameters(self.skeleton, DTYPES[config.train.precision])
        if config.model.attention is not None:
            self.skeleton.config._attn_implementation = config.model.attention
        self.layers = list(decoder_layers(self.skeleton))
        self.kind_of = self._kinds()
        self.packed = config.data.packing is True

    @cached_property
    def attention(self) -> str:
        return self.skeleton.config._attn_implementation

    def _kinds(self) -> list[int]:
        """Of each layer the first one that is made like it."""
        text = self.skeleton.config.get_text_config()
        types = getattr(text, "layer_types", None) or [None] * len(self.layers)
        seen: dict[tuple, int] = {}
        kinds = []
        for index, layer in enumerate(self.layers):
            shapes = tuple(
                (name, tuple(parameter.shape), parameter.requires_grad) for name, parameter in layer.named_parameters()
            )
            kinds.append(seen.setdefault((types[index], shapes), index))
        return kinds

    # What a rank of a layout has

    @cache  # noqa: B019 - a study lives as long as its caches
    def stages(self, count: int) -> list[range]:
        return stage_layers(self.skeleton, count) if count > 1 else [range(len(self.layers))]

    def _placement(self, layer: MoEExperts, ranks: int) -> Placement:
        """As `train.build` places experts of which none is used more than others."""
        ids, count = layer.placement.trainable, layer.spec.num_experts
        if self.config.parallel.placement == "contiguous" or ranks == 1:
            return contiguous(count, ranks=ranks, trainable=ids)
        load = [1.0] * count
        lists = balance(load, ranks=ranks, trainable=ids, spare=self.config.parallel.spare_experts)
        return from_lists(lists, num_experts=count, trainable=ids, load_E=load)

    @cache  # noqa: B019
    def part(self, tensor: int, sequence: int, expert: int, recompute: bool = False) -> nn.Module:
        """One layer of each kind, embedding and head, as a rank of such a layout has them; other layers pass through.

        Raises UserError where the model does not allow these sizes.
        """
        grid = layout(np.lcm(tensor * sequence, expert).item(), tensor=tensor, sequence=sequence, expert=expert)
        model = copy.deepcopy(self._reduced)
        for name, layer in moe_layers(model):
            fresh = MoEExperts(
                layer.spec,
                self._placement(layer, expert),
                grid,
                dtype=next(layer.parameters()).dtype,
                device="meta",
                post_norm=layer.post_norm,
            )
            fresh.origin = layer.origin
            model.set_submodule(name, fresh)
        cut(model, grid)
        if recompute:
            enable_recompute(model)
        return model.train()

    @cache  # noqa: B019
    def refusal(self, tensor: int, sequence: int, pipeline: int) -> str | None:
        """Why the model does not allow these sizes; None where it does."""
        try:
            self.part(tensor, sequence, 1)
            self.stages(pipeline)
        except UserError as error:
            return f"the model does not allow it: {str(error).split(';')[0]}"
        return None

    @cached_property
    def _reduced(self) -> nn.Module:
        kept = set(self.kind_of)
        layers = decoder_layers(self.skeleton)
        whole = list(layers)
        try:
            for index in range(len(layers)):
                if index not in kept:
                    layers[index] = PassThrough()
            return copy.deepcopy(self.skeleton)
        finally:
            for index, layer in enumerate(whole):
                layers[index] = layer

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

    def top_k(self) -> int:
        return getattr(self.skeleton.config.get_text_config(), "num_experts_per_tok", None) or 1

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

    def weights(self, plan: Layout, stage: int) -> Inventory:
        """The parameters of a rank of that stage, layer by layer."""
        by_kind = self._inventory(plan.tensor, plan.sequence, plan.expert)
        layers = self.stages(plan.pipeline)[stage]
        parts = {**by_kind, **{index: by_kind[self.kind_of[index]] for index in layers}}
        last = stage == plan.pipeline - 1
        return of_stage(parts, layers, first=stage == 0, last=last, tied=is_tied(self.skeleton))

    @cache  # noqa: B019
    def _inventory(self, tensor: int, sequence: int, expert: int) -> Inventory:
        return inventory(self.part(tensor, sequence, expert))

    def settings(self, plan: Layout, stage: int) -> Settings:
        sizes = plan.world, plan.tensor, plan.sequence, plan.expert, plan.pipeline
        return self._settings(*sizes, stage, plan.zero_stage)

    @cache  # noqa: B019
    def _settings(self, world, tensor, sequence, expert, pipeline, stage, zero_stage) -> Settings:
        held = self._totals(tensor, sequence, expert, pipeline, stage)
        grid = layout(world, pipeline=pipeline, sequence=sequence, tensor=tensor, expert=expert)
        precision, bucket = self.config.train.precision, self.config.parallel.reduce_bucket_size
        return settings_of(held, grid, zero_stage=zero_stage, precision=precision, bucket=bucket)

    @cache  # noqa: B019
    def _totals(self, tensor: int, sequence: int, expert: int, pipeline: int, stage: int) -> Totals:
        plan = Layout(0, pipeline, sequence, tensor, expert)
        return totals(weight for part in self.weights(plan, stage).values() for weight in part)

    def _stage(self, plan: Layout, stage: int) -> tuple[Course, Inventory]:
        """The parts of a stage, each layer by the name of its kind, and the weights by the same names."""
        layers = self.stages(plan.pipeline)[stage]
        course = Course([self.kind_of[index] for index in layers], stage == 0, stage == plan.pipeline - 1)
        return course, self._inventory(plan.tensor, plan.sequence, plan.expert)

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
    def parts(self, pipeline: int, stage: int) -> Counter:
        """The parts of a stage, by their names in a trace, and how many there are of each."""
        names: list = [self.kind_of[index] for index in self.stages(pipeline)[stage]]
        names += ["embedding"] * (stage == 0) + ["head", "loss"] * (stage == pipeline - 1)
        return Counter(names)

    @cache  # noqa: B019
    def unlike_stages(self, pipeline: int) -> list[int]:
        """One stage of each kind: those between the ends that have layers of the same kinds are alike."""
        kinds = {}
        for stage in range(pipeline):
            kinds.setdefault((frozenset(self.parts(pipeline, stage).items()), 0 < stage < pipeline - 1), stage)
        return list(kinds.values())

    @cache  # noqa: B019
    def read(self, tensor: int, sequence: int, expert: int, recompute: bool, name: str | int) -> tuple[int, int]:
        """Bytes of weights that the products of a part read in a micro-batch: of experts, of all others.

        A weight is read by the forward, by the gradient of what came in, and its own gradient, as large, is written;
        a recomputation reads it once more. The embedding is looked up, and is in no product.
        """
        element = 2 if self.bf16 else 4
        sizes = {True: 0, False: 0}
        weights = () if name == "embedding" else self._inventory(tensor, sequence, expert).get(name, ())
        for weight in weights:
            passes = 2 + weight.trained + (recompute and name != "head")
            sizes[weight.family == "expert"] += passes * element * weight.elements
        return sizes[True], sizes[False]

    def hops(self, plan: Layout) -> list[tuple[int, int]]:
        """(ranks, ranks between neighbours) of each group that a token crosses on its way to its experts."""
        if plan.expert == 1 or not any(self._moe_layers):
            return []
        node = self._nodes(plan.grid)
        if self.dispatcher(plan.grid) == "node":
            return [(plan.expert // node, node), (node, 1)]
        return [(plan.expert, 1)]

    def experts_in(self, plan: Layout, stage: int) -> int:
        """How many layers of that stage have experts."""
        return sum(self._moe_layers[index] > 0 for index in self.stages(plan.pipeline)[stage])

    def wire(self, plan: Layout, stage: int) -> Wire:
        """What a rank of that stage sends in a step."""
        grid, times = plan.grid, plan.micro_batches
        inside = across = 0.0
        tokens = plan.micro_batch * self.config.data.seq_len // grid.slices
        layers = Counter(self._moe_layers[index] for index in self.stages(plan.pipeline)[stage])
        for experts, count in layers.items():
            sent = self._experts_sent(experts, plan.expert, tokens, plan.node_size)
            inside, across = inside + times * count * sent[0], across + times * count * sent[1]
        hidden = self._hidden * plan.micro_batch * self.config.data.seq_len // grid.slices * (2 if self.bf16 else 4)
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

    @cached_property
    def _hidden(self) -> int:
        return self.skeleton.get_input_embeddings().embedding_dim

    @cached_property
    def _moe_layers(self) -> list[int]:
        """Experts of each layer, 0 where it is dense."""
        return [
            next((part.spec.num_experts for part in layer.modules() if isinstance(part, MoEExperts)), 0)
            for layer in self.layers
        ]

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
            hidden=self._hidden,
            top_k=self.top_k(),
            row_bytes=element,
            back_bytes=back,
            chunks=self.config.moe.chunks,
        )
        return sent.inside / expert, sent.across / expert
