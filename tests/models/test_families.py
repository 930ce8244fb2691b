"""Families: what is read off a stock model, and the error for a model that is none."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from moe_dist.errors import UserError
from moe_dist.models import FAMILIES, load_model, moe_layers
from moe_dist.models.families import describe_experts, find_experts, interface_models
from moe_dist.models.nexus.configuration_nexus import MODEL_TYPES as NEXUS_TYPES
from moe_dist.models.skeleton import build_skeleton, make_config
from moe_dist.moe.experts import swiglu
from tests.models.tiny import CONFIGS


def _skeleton(family, **changes):
    values = {"model_type": family, **CONFIGS[family], **changes}
    return build_skeleton(make_config(values, where="test"), torch.float32)


def test_every_named_family_is_tested():
    stock = set(FAMILIES) - set(NEXUS_TYPES)  # ours are tested in tests/methods/nexus
    assert set(CONFIGS) == stock
    assert stock <= set(interface_models())


@pytest.mark.parametrize("family", CONFIGS)
def test_description(family):
    model = _skeleton(family)
    found = describe_experts(model)
    assert [d.name for d in found] == [name for name, _ in find_experts(model)]
    for description in found:
        module = model.get_submodule(description.name)
        assert description.spec.num_experts == module.num_experts
        assert description.spec.hidden == 32
        assert description.transposed == description.spec.bias == (family == "gpt_oss")
        path, router = description.router
        assert path == description.name.replace("experts", "router" if family == "gpt_oss" else "gate")
        assert router.score == ("sigmoid" if family == "deepseek_v3" else "softmax")
        assert model.get_submodule(path).top_k == model.config.num_experts_per_tok


@pytest.mark.parametrize("family", CONFIGS)
def test_router_returns_what_the_family_says(tiny, family):
    model = load_model(tiny(family))
    _, layer = moe_layers(model)[-1]
    path, router = layer.origin.router
    module = model.get_submodule(path)
    values = dict(zip(router.outputs, module(torch.randn(5, 32)), strict=True))
    assert values["logits"].shape == (5, layer.spec.num_experts)
    assert values["weights"].shape == values["ids"].shape == (5, module.top_k)
    assert not values["ids"].is_floating_point()
    if router.correction_bias:
        assert getattr(module, router.correction_bias).shape == (layer.spec.num_experts,)


def test_plain_gates_are_recognised_and_no_other():
    for family in CONFIGS:
        spec = describe_experts(_skeleton(family))[0].spec
        assert (spec.activation is swiglu) == (family != "gpt_oss")
    assert describe_experts(_skeleton("qwen3_moe", hidden_act="gelu"))[0].spec.activation is not swiglu


def test_activation_computes_the_family_s_gate_and_holds_no_weights(tiny):
    stock = transformers.AutoModelForCausalLM.from_pretrained(tiny("gpt_oss"))
    module = stock.model.layers[0].mlp.experts
    spec = describe_experts(stock)[0].spec
    rows = 20 * torch.randn(9, 48)
    expected = module._apply_gate(rows)
    assert torch.equal(spec.activation(rows), expected)
    assert not list(spec.activation.__self__.parameters())
    assert torch.equal(copy.deepcopy(spec).activation(rows), expected)


def test_unknown_families_are_told_the_known_ones(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    for values in ({"model_type": "llama", "num_hidden_layers": 1}, {"model_type": "no_such"}, {}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError) as caught:
            load_model(tmp_path)
        message = str(caught.value)
        for family in FAMILIES:
            assert family in message
        assert "granitemoe" in message
        assert "To add a family" in message
