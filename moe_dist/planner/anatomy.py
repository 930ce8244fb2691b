"""What a model consists of, and what of it a rank of any layout holds: from one look at the model."""

from __future__ import annotations

import copy
from collections import Counter
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
from moe_dist.parallel.grid import Grid, layout
from moe_dist.planner.trace import decoder_layers
from moe_dist.train import memory
from moe_dist.train.build import plan_model
from moe_dist.train.engine import DTYPES, cast_parameters
from moe_dist.train.memory import Inventory, Settings, Totals, is_tied, of_stage, settings_of, totals


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


class Anatomy:
    """The model of a configuration on the meta device: its parts, and what a rank of any layout holds of each.

    device: "cuda" or "cpu", where the model would run: which attention and AdamW it gets there.
    """

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

    @cached_property
    def hidden(self) -> int:
        return self.skeleton.get_input_embeddings().embedding_dim

    @cached_property
    def experts_of_layers(self) -> list[int]:
        """Experts of each layer, 0 where it is dense."""
        return [
            next((part.spec.num_experts for part in layer.modules() if isinstance(part, MoEExperts)), 0)
            for layer in self.layers
        ]

    def top_k(self) -> int:
        return getattr(self.skeleton.config.get_text_config(), "num_experts_per_tok", None) or 1

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

    def experts_in(self, plan: Layout, stage: int) -> int:
        """How many layers of that stage have experts."""
        return sum(self.experts_of_layers[index] > 0 for index in self.stages(plan.pipeline)[stage])

    # What a rank of a layout holds

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

    def weights(self, plan: Layout, stage: int) -> Inventory:
        """The parameters of a rank of that stage, layer by layer."""
        by_kind = self.inventory(plan.tensor, plan.sequence, plan.expert)
        layers = self.stages(plan.pipeline)[stage]
        parts = {**by_kind, **{index: by_kind[self.kind_of[index]] for index in layers}}
        last = stage == plan.pipeline - 1
        return of_stage(parts, layers, first=stage == 0, last=last, tied=is_tied(self.skeleton))

    @cache  # noqa: B019
    def inventory(self, tensor: int, sequence: int, expert: int) -> Inventory:
        return memory.inventory(self.part(tensor, sequence, expert))

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
