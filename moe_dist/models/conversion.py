"""Names and layouts on disk, read from transformers' own conversion mapping.

This file alone leans on how transformers describes its conversions (`transformers.conversion_mapping`,
`transformers.core_model_loading`): renamings are regular expressions over keys, and converters combine tensors with a
chain of operations. Dense tensors go through transformers' own operations. Expert tensors do not: their chain is
translated once into an `ExpertTensorLayout`, which works on a single expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from moe_dist.errors import UserError
from moe_dist.models.layout import Concat, ExpertTensorLayout, Interleave, Step, Transpose


@dataclass
class TensorGroup:
    """Tensors on one side that become tensors on the other side together.

    sources: pattern of the converter -> full names; without a converter the one name under itself.
    """

    first_target: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)

    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def convert(self, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Source name -> tensor to target name -> tensor. Works on meta tensors too, which gives the shapes."""
        if self.converter is None:
            (name,) = self.names()
            return {self.first_target: tensors[name]}
        converter = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            converter.collected_tensors[pattern] = [tensors[name] for name in names]
        made = converter.convert(self.first_target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass
class ReadPlan:
    """How the tensors of a folder fill a transformers model."""

    dense: list[TensorGroup]
    experts: dict[str, ExpertTensorLayout]
    unexpected: list[str]
    transforms: list[WeightTransform]


@dataclass
class WritePlan:
    """How the tensors of a transformers model become the tensors of a folder."""

    dense: list[TensorGroup]
    experts: dict[str, ExpertTensorLayout]
    renamings: list[WeightRenaming]

    def convert(
        self, group: TensorGroup, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel
    ) -> dict[str, torch.Tensor]:
        """The tensors on disk that a group of `dense` becomes."""
        made = group.convert(tensors, model)
        if group.converter is None:
            return made
        return {_rename(name, self.renamings): tensor for name, tensor in made.items()}


def plan_reading(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], num_experts: Mapping[str, int]
) -> ReadPlan:
    """Assign every key on disk to the tensors of a stock `model` (on the meta device).

    shapes: key on disk -> shape of its tensor.
    num_experts: name of each stacked expert tensor in the model -> how many experts it stacks.
    Raises UserError for an expert that is missing, given twice, or stored in a way that is not understood.
    """
    transforms = get_model_conversion_mapping(model)
    renamings, converters = _by_kind(transforms)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    groups: dict[str, TensorGroup] = {}
    unexpected = []
    # Some renamings depend on which keys came before; transformers feeds them in this order.
    for key in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        if target not in state:
            unexpected.append(key)
            continue
        group = groups.setdefault(target, TensorGroup(target, by_pattern.get(pattern)))
        known = group.sources.setdefault(pattern or key, [])
        known.append(key)
        clash = group.converter is not by_pattern.get(pattern)
        if clash or (group.converter is None and len(group.names()) > 1):
            raise UserError(f"several tensors claim {target}: {', '.join(sorted(group.names()))}")

    plan = ReadPlan([], {}, unexpected, transforms)
    for group in groups.values():
        targets = _all_targets(group)
        if not any(target in num_experts for target in targets):
            plan.dense.append(group)
            continue
        turned = shapes[group.names()[0]] != tuple(state[group.first_target].shape)
        per_expert, steps = _steps(group, turned)
        table = _numbered(group, renamings) if per_expert else None
        first = 0
        for target in targets:
            count = num_experts[target]
            rows = _rows(group, table, first, count, target)
            plan.experts[target] = ExpertTensorLayout(target, rows, not per_expert, steps)
            first += count
        if table is not None:
            extra = [key for numbers in table for number, key in numbers.items() if number >= first]
            plan.unexpected.extend(extra)
    return plan


def used_transforms(plan: ReadPlan) -> list[WeightTransform]:
    """The transforms that a folder needed: those that transformers undoes when it saves the model again."""
    return [transform for transform in plan.transforms if transform.was_used()]


def plan_writing(
    model: PreTrainedModel, names: Iterable[str], num_experts: Mapping[str, int], transforms: list | None
) -> WritePlan:
    """How the tensors `names` of a stock `model` are called and laid out on disk.

    transforms: those that the model was read with, or None for a model that was never read from a folder; then the
    family's own naming on the hub is taken.
    """
    if transforms is None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        # Whether such a prefix belongs there is only known from a folder.
        transforms = [transform for transform in transforms if not isinstance(transform, PrefixChange)]
    reverse = [transform.reverse_transform() for transform in transforms[::-1]]
    renamings, converters = _by_kind(reverse)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, TensorGroup] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, [], converters)
        converter = by_pattern.get(pattern)
        if converter is None:
            target = _rename(name, renamings)
        group = groups.setdefault(target, TensorGroup(target, converter))
        group.sources.setdefault(pattern or name, []).append(name)

    plan = WritePlan([], {}, renamings)
    for group in groups.values():
        if any(name in num_experts for name in group.names()):
            plan.experts |= _write_layouts(group, num_experts, renamings)
        else:
            plan.dense.append(group)
    return plan


def _write_layouts(
    group: TensorGroup, num_experts: Mapping[str, int], renamings: list[WeightRenaming]
) -> dict[str, ExpertTensorLayout]:
    if group.converter is None:
        (name,) = group.names()
        return {name: ExpertTensorLayout(name, ((group.first_target,),) * num_experts[name], True)}
    forward = group.converter.reverse_transform()
    per_expert, steps = _translate(forward, group.first_target, turned=False)
    layouts, first = {}, 0
    for pattern in group.converter.source_patterns:
        (name,) = group.sources[pattern]
        count = num_experts[name]
        templates = _expand(group.first_target, group.converter.target_patterns)
        rows = tuple(
            tuple(_rename(template.replace("*", str(first + e)), renamings) for template in templates)
            for e in range(count)
        )
        layouts[name] = ExpertTensorLayout(name, rows, not per_expert, steps)
        first += count
    return layouts


def _by_kind(transforms: list[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    return renamings, [transform for transform in transforms if isinstance(transform, WeightConverter)]


def _rename(key: str, renamings: list[WeightRenaming]) -> str:
    return rename_source_key(key, renamings, [])[0]


def _expand(first_target: str, patterns: list[str]) -> list[str]:
    """The full name of the first target, with each of a converter's target patterns in place of the first."""
    before, _, after = first_target.partition(patterns[0])
    return [before + pattern + after for pattern in patterns]


def _all_targets(group: TensorGroup) -> list[str]:
    if group.converter is None:
        return [group.first_target]
    return _expand(group.first_target, group.converter.target_patterns)


def _steps(group: TensorGroup, turned: bool) -> tuple[bool, tuple[Step, ...]]:
    if group.converter is None:
        return False, ()
    missing = [pattern for pattern in group.converter.source_patterns if pattern not in group.sources]
    if missing:
        raise UserError(f"{group.first_target}: the folder holds no tensor called {' or '.join(missing)}")
    return _translate(group.converter, group.first_target, turned)


def _translate(converter: WeightConverter, target: str, turned: bool) -> tuple[bool, tuple[Step, ...]]:
    """A converter's operations -> (does each expert have keys of its own, the steps for one expert).

    Operations name dimensions of the stacked tensor; a step has the expert dimension 0 taken away. `turned`: the
    tensor on disk is not shaped like the model's, which only an operation that asks for it (`check_dims`) looks at:
    transformers defines those layouts by the shape, and a tensor of the model's own shape is never transposed.
    """
    per_expert, steps = False, []
    for position, operation in enumerate(converter.operations):
        kind = type(operation).__name__
        dims = [getattr(operation, name) for name in ("dim", "dim0", "dim1") if hasattr(operation, name)]
        if kind == "MergeModulelist" and position == 0 and operation.dim == 0:
            per_expert = True
        elif kind == "ErnieFuseAndSplitTextVisionExperts" and operation.stack_dim == 0:
            # One list of experts on disk, the first ones for text and the rest for images.
            per_expert = True
            if len(converter.source_patterns) > 1:
                steps.append(Concat(operation.concat_dim - 1))
        elif kind == "Concatenate" and min(dims) > 0:
            steps.append(Concat(operation.dim - 1))
        elif kind == "Transpose" and min(dims) > 0:
            if turned or not operation.check_dims:
                steps.append(Transpose(operation.dim0 - 1, operation.dim1 - 1))
        elif kind == "Interleave" and min(dims) > 0:
            steps.append(Interleave(operation.dim - 1, operation.inverse))
        else:
            raise UserError(
                f"{target}: transformers stores these experts with the operation {operation}, which is not understood "
                "for single experts. To add it, describe its effect on one expert in moe_dist/models/layout.py and "
                "translate it in moe_dist/models/conversion.py"
            )
    return per_expert, tuple(steps)


def _numbered(group: TensorGroup, renamings: list[WeightRenaming]) -> list[dict[int, str]]:
    """For each source pattern: the number in place of its `*` -> the key on disk."""
    table = []
    for pattern in group.converter.source_patterns:
        number = re.compile(pattern.replace("*.", r"(\d+)\."))
        numbers: dict[int, str] = {}
        for key in group.sources[pattern]:
            found = number.search(_rename(key, renamings))
            assert found, f"{key} matched {pattern} without a number"
            if int(found.group(1)) in numbers:
                raise UserError(f"two tensors for one expert: {numbers[int(found.group(1))]} and {key}")
            numbers[int(found.group(1))] = key
        table.append(numbers)
    return table


def _rows(
    group: TensorGroup, table: list[dict[int, str]] | None, first: int, count: int, target: str
) -> tuple[tuple[str, ...], ...]:
    """Of each expert of `target`, the keys of its parts."""
    if table is None:
        patterns = [None] if group.converter is None else group.converter.source_patterns
        keys = tuple(group.names()[0] if pattern is None else group.sources[pattern][0] for pattern in patterns)
        return (keys,) * count
    rows = []
    for number in range(first, first + count):
        for numbers in table:
            if number not in numbers:
                example = next(iter(numbers.values()))
                raise UserError(
                    f"{target} needs {count} experts, and expert {number - first} is missing: the folder holds "
                    f"{len(numbers)} tensors such as {example}, but none with number {number}"
                )
        rows.append(tuple(numbers[number] for numbers in table))
    return tuple(rows)
