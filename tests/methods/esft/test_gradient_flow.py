"""E6: gradients pass through frozen layers, stop below the lowest that trains, and leave nothing behind on the way."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe_dist.data.attention import model_inputs
from moe_dist.models.surgery import moe_layers
from moe_dist.moe import layer as moe_layer
from moe_dist.train.losses import label_loss_sum
from moe_dist.train.routing import Routing
from moe_dist.train.rows import rank_rows
from tests.methods.esft.cases import batch, built, configured
from tests.models.tiny import make_folder

LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_folder("qwen3_moe", tmp_path_factory.mktemp("flow"), num_hidden_layers=LAYERS))


def backward(folder: str, experts: dict, **moe):
    """The model after one backward of the loss, with the balance loss of `moe` where it asks for one."""
    model, grid = built(configured(folder, experts, moe=moe))
    routing = Routing(model, configured(folder, experts, moe=moe).moe, grid)
    data = batch()
    rows = rank_rows(data, grid)
    routing.start_step()
    routing.see(rows.real_BS)
    with routing.listening():
        logits = model(**model_inputs(data, model.config)).logits
    (label_loss_sum(logits, data["labels"]) / 46 + routing.loss_share(rows)).backward()
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_lowest_expert_gets_its_gradient_through_frozen_layers(folder):
    model = backward(folder, {"0": [1, 4]})
    found = gradients(model)
    assert set(found) == {f"model.layers.0.mlp.experts.trainable.{name}" for name in ("gate_up_proj", "down_proj")}
    for gradient in found.values():
        assert gradient.shape[0] == 2
        assert (gradient.flatten(1).norm(dim=1) > 0).all()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad is None
        assert not layer.mlp.gate.weight.requires_grad


def test_the_balance_loss_of_frozen_routers_reaches_earlier_experts(folder):
    """It is a function of the hidden states, and so of the experts below; of the highest layer's experts it is none."""
    plain = gradients(backward(folder, {"0": [1, 4]}))
    for form in ("hf", "layer_micro", "layer_sequence", "layer_global"):
        with_loss = gradients(backward(folder, {"0": [1, 4]}, balance_loss=form, balance_coef=0.1))
        without = gradients(backward(folder, {"0": [1, 4]}, balance_loss=form, balance_coef=0.0))
        assert with_loss.keys() == without.keys() == plain.keys()
        for name, gradient in plain.items():
            assert (with_loss[name] - gradient).norm() > 1e-4 * gradient.norm(), (form, name)
            assert torch.equal(without[name], gradient), (form, name)
        top = {str(LAYERS - 1): [1, 4]}
        above, alone = (gradients(backward(folder, top, **loss)) for loss in ({"balance_loss": form}, {}))
        assert all(torch.equal(above[name], gradient) for name, gradient in alone.items())


def trace(folder: str, experts: dict, ep: int = 1) -> dict:
    """On each rank: what requires grad after each layer, what is kept where, and the exchanges of the backward."""
    model, _ = built(configured(folder, experts, parallel={"expert": ep}))
    found: dict = {"requires_grad": [], "kept": [0] * LAYERS, "in_experts": [], "exchanges": 0}
    place = {"layer": None}

    def enter(index):
        return lambda *_: place.update(layer=index)

    def leave(_, __, output):
        found["requires_grad"].append((output[0] if isinstance(output, tuple) else output).requires_grad)
        place["layer"] = None

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(enter(index))
        layer.register_forward_hook(leave)

    def keep(tensor):
        if place["layer"] is not None:
            found["kept"][place["layer"]] += 1
        return tensor

    real = moe_layer.mixture

    def mixture(x_TH, probs_TK, plan, how, spans):
        sizes = []

        def see(tensor):
            sizes.append(tensor.numel() if tensor.dim() == 2 else 0)  # rows; the stacks of weights are 3-D
            return keep(tensor)

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            out = real(x_TH, probs_TK, plan, how, spans)
        counts = torch.tensor(plan.parts[0].seat_counts).split(list(how.held))
        found["in_experts"].append(([int(count.sum()) for count in counts], sum(sizes)))
        return out

    data = batch(step=dist.get_rank())
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with patch.object(moe_layer, "mixture", mixture), hooks:
        logits = model(**model_inputs(data, model.config)).logits
    exchange = dist.all_to_all_single

    def counted(*args, **options):
        found["exchanges"] += 1
        return exchange(*args, **options)

    with patch.object(dist, "all_to_all_single", counted):
        label_loss_sum(logits, data["labels"]).backward()
    spec = next(iter(moe_layers(model)))[1].spec
    return {**found, "hidden": spec.hidden, "inner": spec.inner}


@pytest.mark.parametrize("lowest", range(LAYERS))
def test_nothing_runs_or_is_kept_below_the_lowest_layer_that_trains(ranks, folder, lowest):
    (found,) = ranks(1, trace, folder, {str(lowest): [1, 4]})
    assert found["requires_grad"] == [layer >= lowest for layer in range(LAYERS)]
    assert [kept > 0 for kept in found["kept"]] == [layer >= lowest for layer in range(LAYERS)]


def test_rows_are_kept_for_the_trainable_span_alone(ranks, folder):
    """Below its own layer, a selected expert keeps its rows and z; above, frozen experts keep z, never their rows."""
    (found,) = ranks(1, trace, folder, {"1": [1, 4]})
    hidden, inner = found["hidden"], found["inner"]
    below, lowest, above = found["in_experts"]
    assert below == ([96], 0)
    (trained, frozen), kept = lowest
    assert trained > 0
    assert frozen > trained
    assert kept == trained * (hidden + inner)
    (frozen,), kept = above
    assert kept == frozen * inner


@pytest.mark.parametrize("lowest", range(LAYERS))
def test_every_rank_exchanges_as_often_and_no_more_than_needed(ranks, folder, lowest):
    """Expert 1 lives on the first rank. A layer above sends gradients of its output away and gets those of its rows and
    of their probabilities back, the lowest only the first of the three, those below nothing."""
    for found in ranks(2, trace, folder, {str(lowest): [1]}, 2, timeout=60):
        assert found["exchanges"] == 1 + 3 * (LAYERS - 1 - lowest)
        assert found["requires_grad"] == [layer >= lowest for layer in range(LAYERS)]
