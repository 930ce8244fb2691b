"""What the tensors of an adapter are called, and where in a model each of them belongs.

An adapter holds the full weights of the selected experts, each under the name that it has on the hub, such as
`model.layers.3.mlp.experts.17.gate_proj.weight`. Where a family's files stack the experts of a layer in one tensor
(gpt-oss: `model.layers.3.mlp.experts.gate_up_proj`), the adapter has row e of it, under the name with the number of
the expert before the last part: `model.layers.3.mlp.experts.17.gate_up_proj`. The names are those of the hub however
the base model happens to be stored, so an adapter does not depend on that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moe_dist.config.expert_files import ExpertConfig
from moe_dist.errors import UserError
from moe_dist.models.conversion import TensorGroup, WritePlan, plan_reading, plan_writing
from moe_dist.models.families import ExpertsDescription, describe_experts, expert_counts, unknown_family
from moe_dist.models.layout import ExpertTensorLayout
from moe_dist.models.loading import DtypePlan
from moe_dist.models.skeleton import build_skeleton
from moe_dist.moe.layer import MoEExperts
from moe_dist.train.trainable import is_shared_expert, layer_index


class ExpertTensor(NamedTuple):
    """One expert's share of a stacked tensor, by the name that the tensor has in the stock transformers model."""

    name: str
    expert: int


@dataclass(frozen=True)
class Contents:
    """What an adapter holds. experts: {layer index: ids}. dense: stock names of tensors outside the routed experts."""

    experts: dict[str, list[int]]
    dense: tuple[str, ...] = ()

    def config(self) -> ExpertConfig:
        shared = [is_shared_expert(name) for name in self.dense]
        return ExpertConfig(self.experts, any(shared), not all(shared))


class AdapterNames:
    """The naming of one architecture. Needs a configuration and no weights.

    skeleton: the stock model on the meta device. layouts: stacked tensor of the stock model -> its experts' parts as
    an adapter has them. places: name of a part -> (expert tensor, number of the part).
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, cls: type[PreTrainedModel] | None = None):
        self.skeleton = build_skeleton(deepcopy(config), dtype, cls)
        self.skeleton.tie_weights(recompute_mapping=False)
        self.descriptions = describe_experts(self.skeleton)
        if not self.descriptions:
            raise unknown_family(config.model_type)
        self.counts = expert_counts(self.descriptions)
        self.plan = self._plan()
        self.layouts = {name: _one_by_one(layout) for name, layout in self.plan.experts.items()}
        self.places = {
            key: (ExpertTensor(name, expert), part)
            for name, layout in self.layouts.items()
            for expert, keys in enumerate(layout.keys)
            for part, key in enumerate(keys)
        }
        self._dtypes = DtypePlan(self.skeleton, dtype)
        self._dtype = dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> AdapterNames:
        """The naming of a model, whether its experts are ours or transformers' own."""
        return cls(model.config, model.dtype, type(model))

    def layers(self) -> dict[str, ExpertsDescription]:
        """{layer index: its experts}; UserError where an index has several."""
        found: dict[str, ExpertsDescription] = {}
        for description in self.descriptions:
            index = str(layer_index(description.name))
            if index in found:
                raise UserError(
                    f"{found[index].name} and {description.name} have the same layer index {index}; an expert config "
                    "cannot tell them apart"
                )
            found[index] = description
        return found

    def expert_tensors(self, experts: Mapping[str, Iterable[int]]) -> list[ExpertTensor]:
        """The tensors of these experts, layer by layer; UserError for layers and experts that do not exist."""
        layers, found = self.layers(), []
        for index, ids in experts.items():
            if index not in layers:
                raise UserError(
                    f"layer {index} has no experts in this model; layers with experts are {', '.join(layers)}"
                )
            description = layers[index]
            bad = sorted(set(ids) - set(range(description.spec.num_experts)))
            if bad:
                raise UserError(
                    f"layer {index}: no experts {bad}; this model has experts 0 to {description.spec.num_experts - 1}"
                )
            names = [description.stock_name(parameter) for parameter in description.spec.shapes()]
            found += [ExpertTensor(name, expert) for expert in ids for name in names]
        return found

    def keys(self, tensor: ExpertTensor) -> tuple[str, ...]:
        return self.layouts[tensor.name].keys[tensor.expert]

    def part_shapes(self, tensor: ExpertTensor) -> list[tuple[int, ...]]:
        """Shapes of the expert's parts, in the order of `keys`."""
        shape = self.skeleton.get_parameter(tensor.name).shape[1:]
        return [tuple(part.shape) for part in self.layouts[tensor.name].split(torch.empty(shape, device="meta"))]

    def split(self, tensor: ExpertTensor, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """(key, part) of an expert's tensor, given as the stock model has it."""
        return list(zip(self.keys(tensor), self.layouts[tensor.name].split(value), strict=True))

    def dense_groups(self, names: Iterable[str]) -> list[TensorGroup]:
        """The groups of tensors outside the experts in which these stock names go to disk, always whole."""
        names = set(names)
        return [group for group in self.plan.dense if names & set(group.names())]

    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor outside the routed experts that there is, by its name on the hub, and its shape there."""
        state = self.skeleton.state_dict()
        shapes = {}
        for group in self.plan.dense:
            made = self.plan.convert(group, {name: state[name] for name in group.names()}, self.skeleton)
            shapes |= {key: tuple(tensor.shape) for key, tensor in made.items()}
        return shapes

    def read_dense(self, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorGroup]:
        """The groups in which these tensors, by their names on the hub, become tensors of the stock model."""
        plan = plan_reading(self.skeleton, shapes, self.counts)
        assert not plan.unexpected, plan.unexpected
        return plan.dense

    def dtype(self, name: str) -> torch.dtype:
        """Of a stock tensor as the model keeps it: the model's, but for tensors that transformers keeps in fp32."""
        return self._dtypes.get(name, self._dtype)

    def _plan(self) -> WritePlan:
        ignored = set(self.skeleton._keys_to_ignore_on_save or ())
        tied = self.skeleton.all_tied_weights_keys
        state = self.skeleton.state_dict(keep_vars=True)
        seen: dict[int, str] = {}
        # Of several names of one tensor, the one that the others are tied to is kept.
        for name in sorted(state.keys() - ignored, key=lambda name: (name in tied, name)):
            seen.setdefault(id(state[name]), name)
        return plan_writing(self.skeleton, seen.values(), self.counts, None)


def expert_views(model: PreTrainedModel) -> dict[ExpertTensor, torch.Tensor]:
    """Every expert tensor that this rank holds as a view in the layout of the stock model: writing to it is seen.

    UserError where an engine has taken the parameters apart (ZeRO 3).
    """
    ours = [module for module in model.modules() if isinstance(module, MoEExperts)]
    views = {}
    for layer in ours:
        for parameter_name, parameter, seat_ids in layer.expert_parameters():
            name = layer.origin.stock_name(parameter_name)
            check_whole(name, parameter)
            for seat, expert in enumerate(seat_ids):
                if expert is not None:
                    views[ExpertTensor(name, expert)] = layer.origin.turn(parameter.data[seat])
    for description in [] if ours else describe_experts(model):
        for parameter_name in description.spec.shapes():
            name = description.stock_name(parameter_name)
            stacked = model.get_parameter(name)
            check_whole(name, stacked)
            views |= {ExpertTensor(name, expert): row for expert, row in enumerate(stacked.data)}
    if not views:
        raise unknown_family(getattr(model.config, "model_type", None))
    return views


def check_whole(name: str, parameter: torch.nn.Parameter) -> None:
    if hasattr(parameter, "ds_id") and not parameter.numel() == parameter.ds_numel:
        raise UserError(
            f"{name} is partitioned by ZeRO 3, so that no process holds it whole. Load the model, score and apply a "
            "selection before the TrainingArguments with ZeRO 3 are made; the engine partitions it afterwards"
        )


def _one_by_one(layout: ExpertTensorLayout) -> ExpertTensorLayout:
    """The layout with names of its own for each expert."""
    if not layout.stacked:
        return layout
    rows = []
    for expert, keys in enumerate(layout.keys):
        parts = [key.rpartition(".") for key in keys]
        rows.append(tuple(f"{path}.{expert}.{name}" for path, _, name in parts))
    return replace(layout, keys=tuple(rows), stacked=False)
