"""Layouts of one expert on disk: each step and its inverse, and what is understood of transformers' operations."""

from __future__ import annotations

import pytest
import torch
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, WeightConverter
from transformers.core_model_loading import Interleave as StockInterleave
from transformers.core_model_loading import Transpose as StockTranspose

from moe_dist.errors import UserError
from moe_dist.models.conversion import _translate
from moe_dist.models.layout import Concat, ExpertTensorLayout, Interleave, Transpose


@pytest.mark.parametrize(
    ("steps", "parts"),
    [
        ((), 1),
        ((Concat(0),), 2),
        ((Transpose(0, 1), Concat(1)), 2),
        ((Interleave(0),), 1),
        ((Interleave(1, inverse=True), Transpose(0, 1)), 1),
    ],
)
def test_split_undoes_join(steps, parts):
    layout = ExpertTensorLayout("t", (tuple(f"k{i}" for i in range(parts)),), False, steps)
    on_disk = [torch.randn(6, 4) for _ in range(parts)]
    joined = layout.join(on_disk)
    back = layout.split(joined)
    assert len(back) == parts
    for mine, original in zip(back, on_disk, strict=True):
        assert torch.equal(mine, original)
    assert layout.disk_shapes(tuple(joined.shape)) == {f"k{i}": (6, 4) for i in range(parts)}


def test_steps_do_what_transformers_operations_do():
    experts = [[torch.randn(6, 4) for _ in range(3)] for _ in range(2)]
    sources = ["experts.*.a", "experts.*.b"]
    operations = [MergeModulelist(0), Concatenate(1), StockTranspose(1, 2), StockInterleave(1)]
    converter = WeightConverter(sources, "experts.ab", operations)
    for source, tensors in zip(sources, experts, strict=True):
        converter.collected_tensors[source] = list(tensors)
    (expected,) = converter.convert("experts.ab").values()
    per_expert, steps = _translate(converter, "experts.ab", turned=False)
    assert per_expert
    layout = ExpertTensorLayout("experts.ab", (("a", "b"),) * 3, False, steps)
    for e in range(3):
        assert torch.equal(layout.join([experts[0][e], experts[1][e]]), expected[e])


def test_operations_across_experts_are_not_understood():
    converter = WeightConverter("experts.all", ["experts.a", "experts.b"], [Chunk(dim=0)])
    with pytest.raises(UserError, match="is not understood"):
        _translate(converter, "experts.a", turned=False)


def test_a_transposition_by_shape_is_decided_by_the_shape_alone():
    converter = WeightConverter("experts.all", "experts.all", [StockTranspose(1, 2, check_dims=True)])
    assert _translate(converter, "experts.all", turned=False) == (False, ())
    assert _translate(converter, "experts.all", turned=True) == (False, (Transpose(0, 1),))
