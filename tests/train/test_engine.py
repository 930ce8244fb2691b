"""The engine on one device, with DeepSpeed and without."""

from __future__ import annotations

import pytest
import torch

from moe_dist.errors import UserError
from moe_dist.parallel.grid import Grid
from moe_dist.train.engine import build_engine
from tests.reference import relative_error
from tests.train import toy
from tests.train.runner import Case, assembled, steps_with, train, train_plain

CASE = {"trainable": [[0, 1], [3]], "accumulation": 2}


@pytest.mark.parametrize(("backend", "stage"), [("plain", 0), ("deepspeed", 0), ("deepspeed", 2)])
def test_one_process_trains_like_plain_torch(ranks, backend, stage):
    case = Case(backend=backend, stage=stage, **CASE)
    expected = train_plain(case, case.accumulation)
    (result,) = ranks(1, train, case, timeout=120)
    for kind in ("gradients", "weights", "exp_avg", "exp_avg_sq"):
        found = assembled([result[kind]])
        assert found.keys() == expected[kind].keys()
        for key, tensor in found.items():
            assert relative_error(tensor, expected[kind][key]) <= 2e-6, (kind, key)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-6)


def test_plain_engine_skips_a_bad_step():
    result = steps_with(Case(backend="plain", accumulation=2), {1: "gradient alone is nan"})
    assert result["skipped"] == [False, True, False]
    before, after, _ = result["states"]
    assert before["adam_step"] == after["adam_step"] == 1
    for (*where, tensor), (*_, again) in zip(before["weights"], after["weights"], strict=True):
        assert (tensor == again).all(), where


def test_frozen_tensors_keep_their_bits():
    weights = toy.full_weights()
    model = toy.parallel_model(weights, Grid.single(), [[1], [0, 2]], dense_trains=False)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    engine = build_engine(model, Grid.single(), weight_decay=0.5, backend="plain")
    for row in toy.batches(100, 1):
        ((ids_T, labels_T),) = row
        engine.backward(toy.loss_sum(engine.forward(ids_T=ids_T), labels_T))
        engine.step(1e-2)
    for name, tensor in frozen.items():
        assert torch.equal(model.get_parameter(name), tensor), name
    assert not torch.equal(model.layers[0].experts.trainable.down_proj[0], weights["layers.0.experts.down_proj"][1])


def test_nothing_to_train_is_an_error():
    model = toy.parallel_model(toy.full_weights(), Grid.single(), [[], []], dense_trains=False)
    with pytest.raises(UserError, match="no parameter of the model trains"):
        build_engine(model, Grid.single(), backend="plain")


def test_several_ranks_need_deepspeed():
    model = toy.parallel_model(toy.full_weights(), Grid.single(), [[0], []])
    with pytest.raises(UserError, match="pip install deepspeed"):
        build_engine(model, Grid(world=2, data=2), backend="plain")


def test_buffers_keep_their_dtype():
    model = toy.parallel_model(toy.full_weights(), Grid.single(), [[0], []])
    model.register_buffer("expert_bias", torch.tensor([1.0000001]))
    build_engine(model, Grid.single(), precision="bf16", backend="plain").close()
    assert model.expert_bias.dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16
