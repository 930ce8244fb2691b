"""What a rank holds, and what the engine keeps beside it at each ZeRO stage, as DeepSpeed 0.19.8 and `train` do it.

Bytes for N held and n trained elements of a family with r replicas:

    stage    weights   masters   moments   gradients                   beside
    0 fp32   4N        -         8n        4n                          4n while they are reduced
    0 bf16   2N        4n        8n        4n                          4n while they are reduced
    1 fp32   4N        4n/r      8n/r      4n; the part kept: 4n/r     bucket; a group's 4n/r in the update
    1 bf16   2N        4n/r      8n/r      4n, and 2n in a step        4n while they are reduced
    2 fp32   4N        4n/r      8n/r      4n/r, of two micro-batches  bucket, and once more; a group's 4n/r
    2 bf16   2N        4n/r      8n/r      4n/r                        bucket, and once more
    3 fp32   4N/r      4n/r      8n/r      4n/r                        bucket, gathered weights; a group's 4n/r
    3 bf16   2N/r      4n/r      8n/r      4n/r                        bucket, gathered weights; a group's 4n/r

`planner` follows what lies beside, and activations, through a step; `--dry-run` and the preflight take what does not
depend on the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from moe_dist.parallel.grid import Grid
from moe_dist.train.family import EXPERT, FAMILIES, family_of, replicas_of
from moe_dist.train.trainable import layer_index

FP32 = 4
EMBEDDING, HEAD = "embedding", "head"


@dataclass(frozen=True)
class Weight:
    """A parameter of one rank. elements: as the rank holds it before ZeRO. decays: whether weight decay applies."""

    elements: int
    family: str
    trained: bool
    decays: bool


Inventory = Mapping[str | int, tuple[Weight, ...]]


def weight_of(parameter: nn.Parameter) -> Weight:
    family = family_of(parameter)
    decays = parameter.dim() - (family == EXPERT) >= 2
    return Weight(parameter.numel(), family, parameter.requires_grad, decays)


def inventory(model: nn.Module) -> Inventory:
    """The parameters of the embedding, of each decoder layer by its index, and of all the rest (head).

    model: with what trains marked (`trainable.freeze`).
    """
    embedding = model.get_input_embeddings()
    first = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    parts: dict[str | int, list[Weight]] = {}
    for name, parameter in model.named_parameters():
        index = layer_index(name)
        part = index if index is not None else EMBEDDING if id(parameter) in first else HEAD
        parts.setdefault(part, []).append(weight_of(parameter))
    return {part: tuple(weights) for part, weights in parts.items()}


def is_tied(model: nn.Module) -> bool:
    """Whether the head's weight is the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def of_stage(parts: Inventory, layers: range, *, first: bool, last: bool, tied: bool) -> Inventory:
    """The parts that a pipeline stage of those layers holds.

    tied: whether the whole model is so (`is_tied`): its last stage then has a copy of the embedding.
    """
    found = {index: parts[index] for index in layers}
    if first:
        found[EMBEDDING] = parts.get(EMBEDDING, ())
    if last:
        found[HEAD] = parts.get(HEAD, ()) + (parts.get(EMBEDDING, ()) if tied and not first else ())
    return found


@dataclass(frozen=True)
class Totals:
    """Elements of one rank by family: all, and those that train; `groups`: trained ones by optimizer group, `largest`
    the largest single parameter that trains."""

    held: Mapping[str, int]
    trained: Mapping[str, int]
    groups: Mapping[tuple[str, bool], int]
    largest: int


def totals(weights: Iterable[Weight]) -> Totals:
    held, trained = dict.fromkeys(FAMILIES, 0), dict.fromkeys(FAMILIES, 0)
    groups: dict[tuple[str, bool], int] = {}
    largest = 0
    for weight in weights:
        held[weight.family] += weight.elements
        if weight.trained:
            trained[weight.family] += weight.elements
            key = weight.family, weight.decays
            groups[key] = groups.get(key, 0) + weight.elements
            largest = max(largest, weight.elements)
    return Totals(held, trained, groups, largest)


@dataclass(frozen=True)
class Settings:
    """Of one rank. bucket: elements that ZeRO reduces at a time. replicas: by family, the ranks that hold the same."""

    stage: int
    bf16: bool
    bucket: int
    totals: Totals
    replicas: Mapping[str, int]

    @property
    def element(self) -> int:
        return 2 if self.bf16 else FP32

    def _shared(self, by_family: Mapping[str, int]) -> int:
        return sum(-(-count // self.replicas[family]) for family, count in by_family.items())

    @cached_property
    def trained(self) -> int:
        return sum(self.totals.trained.values())

    @cached_property
    def owned(self) -> int:
        """Elements whose masters and moments this rank keeps."""
        return self.trained if self.stage == 0 else self._shared(self.totals.trained)

    @property
    def bucket_elements(self) -> int:
        return min(self.bucket, self.trained)

    @property
    def largest_owned_group(self) -> int:
        return max((-(-count // self.replicas[family]) for (family, _), count in self.totals.groups.items()), default=0)

    # What stays from step to step

    @cached_property
    def weights(self) -> int:
        held = self.totals.held
        return self.element * (self._shared(held) if self.stage == 3 else sum(held.values()))

    @property
    def masters(self) -> int:
        return 0 if self.stage == 0 and not self.bf16 else FP32 * self.owned

    @property
    def moments(self) -> int:
        return 2 * FP32 * self.owned

    @property
    def standing_gradients(self) -> int:
        """Gradient buffers that are never given back."""
        if self.stage == 3:
            return FP32 * self.owned
        return FP32 * self.trained if self.stage == 1 and self.bf16 else 0

    @property
    def standing_buffers(self) -> int:
        return FP32 * self.bucket_elements if self.stage == 3 else 0

    @property
    def optimizer(self) -> int:
        return self.masters + self.moments

    @cached_property
    def resident(self) -> int:
        return self.weights + self.masters + self.moments + self.standing_gradients + self.standing_buffers

    # What there is at the end of a backward, whatever the micro-batches and activations

    @property
    def gradients(self) -> int:
        """Gradients of all that trains, or this rank's share of them."""
        if self.stage < 2:
            return FP32 * self.trained + (2 * self.trained if self.stage == 1 and self.bf16 else 0)
        return FP32 * self.owned

    @property
    def buffers(self) -> int:
        bucketed = self.stage >= 2 or (self.stage == 1 and not self.bf16)
        return FP32 * self.bucket_elements if bucketed else 0

    @property
    def before_activations(self) -> dict[str, int]:
        """Bytes by what they are for: the least that a step takes."""
        names = "weights", "masters", "moments", "gradients", "buffers"
        return {name: getattr(self, name) for name in names}

    @cached_property
    def before_activations_total(self) -> int:
        return sum(self.before_activations.values())


def settings_of(held: Totals, grid: Grid, *, zero_stage: int, precision: str, bucket: int) -> Settings:
    """Of a rank of that layout. precision: "bf16" or "fp32"."""
    replicas = {family: replicas_of(family, grid).count for family in FAMILIES}
    return Settings(zero_stage, precision == "bf16", bucket, held, replicas)
