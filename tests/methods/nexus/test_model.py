"""Nexus models of every dense family: what the block computes, and folders that come back to the bit."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from moe_dist.errors import UserError
from moe_dist.models import export_model, init_model, load_model, moe_layers
from moe_dist.models.nexus.configuration_nexus import CONFIGS
from tests.methods.nexus.tiny import DENSE, ROUTERS, copies_of, dense_model, nexus_folder, nexus_model, sizes
from tests.models.compare import distance, file_tensors, same_bits
from tests.models.tiny import batch


def _logits(model, ids=None) -> torch.Tensor:
    with torch.no_grad():
        return model(batch() if ids is None else ids).logits


@pytest.mark.parametrize("family", DENSE)
def test_n2_identical_experts_give_one_plus_gate_times_the_mlp(family, tmp_path):
    dense = dense_model(family)
    copies_of(dense, copies=3).save_pretrained(tmp_path / "nexus")
    x = torch.randn(2, 9, 32)
    for model in (
        load_model(tmp_path / "nexus"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nexus"),
    ):
        for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
            with torch.no_grad():
                gate = ours.mlp.gate(x)[1].view(2, 9, 1)
                expected = (1 + gate) * theirs.mlp(x)
                assert 1 / 3 < gate.max() < 1
                assert distance(ours.mlp(x), expected) < 1e-6
                assert distance(ours.mlp(x), theirs.mlp(x)) > 0.3


@pytest.mark.parametrize("family", DENSE)
def test_n2_without_routed_output_it_is_the_dense_model(family, tmp_path):
    dense = dense_model(family)
    nexus = copies_of(dense, copies=3)
    with torch.no_grad():
        for layer in nexus.model.layers:
            layer.mlp.experts.down_proj.zero_()
    nexus.save_pretrained(tmp_path / "nexus")
    assert distance(_logits(load_model(tmp_path / "nexus")), _logits(dense)) < 1e-6


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("family", DENSE)
def test_n2_weights_that_sum_to_one_without_shared_expert_are_the_dense_model(family, top_k, tmp_path):
    dense = dense_model(family)
    fields = {"use_shared_expert": False, "norm_topk_prob": True, "router": "linear", "num_experts_per_tok": top_k}
    copies_of(dense, copies=3, **fields).save_pretrained(tmp_path / "nexus")
    assert distance(_logits(load_model(tmp_path / "nexus")), _logits(dense)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", DENSE)
def test_load_and_export_change_no_bit(family, dtype, tmp_path):
    folder = nexus_folder(family, tmp_path / "in", dtype=dtype, domain_space={"embedder": "x"}, expert_names=[*"abcd"])
    model = load_model(folder)
    assert type(model).__name__.startswith("Nexus")
    assert len(moe_layers(model)) == 2
    assert model.model.layers[0].mlp.gate.domain_embeddings.dtype == torch.float32
    out = export_model(model, tmp_path / "out")
    same_bits(file_tensors(out), file_tensors(folder))
    same_bits(load_model(out).state_dict(), model.state_dict())
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, out))
    assert before == after
    assert before["model_type"] == f"nexus_{family}"


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", DENSE)
def test_our_experts_compute_what_stock_experts_do(family, router, tmp_path):
    folder = nexus_folder(family, tmp_path / "in", router=router)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    model = load_model(folder)
    assert distance(_logits(model), _logits(stock)) < 2e-6
    for layer in model.model.layers:
        assert len(layer.mlp.gate(torch.randn(40, 32))[2].unique()) > 1


def test_generation_with_a_cache_is_that_of_the_whole_sequence(tmp_path):
    model = load_model(nexus_folder("qwen3", tmp_path / "in"))
    prompt = batch(rows=1, length=5)
    out = model.generate(prompt, max_new_tokens=6, do_sample=False)
    greedy = _logits(model, out).argmax(-1)
    assert torch.equal(out[0, 5:], greedy[0, 4:-1])


def test_an_inline_configuration_is_initialised_like_any_other():
    config = {**sizes("llama"), "model_type": "nexus_llama", "num_experts": 3}
    model = init_model(config, seed=1)
    gate = model.model.layers[0].mlp.gate
    assert gate.temperature.item() == 8.0
    assert 0.01 < gate.w1.std() < 0.03
    assert gate.domain_embeddings.std() > 0.5
    assert not torch.equal(gate.w1, model.model.layers[1].mlp.gate.w1)
    same_bits(init_model(config, seed=1).state_dict(), model.state_dict())


def test_configurations_that_cannot_be(tmp_path):
    folder = nexus_folder("llama", tmp_path / "in")
    values = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"router": "cosine"}, "prototype, paper, linear"),
        ({"num_experts_per_tok": 5}, "of 4 experts"),
        ({"domain_dim": 7}, "prototype"),
        ({"expert_names": ["a"]}, "1 names for 4 experts"),
        ({"mlp_bias": True}, "no biases"),
    ):
        (folder / "config.json").write_text(json.dumps({**values, **changes}))
        with pytest.raises(UserError, match=said):
            load_model(folder)


def test_every_family_has_its_classes():
    for family, config in CONFIGS.items():
        model = nexus_model(family)
        assert type(model.config) is config
        assert issubclass(config, type(dense_model(family).config))
        assert isinstance(model.model.layers[0].self_attn, type(dense_model(family).model.layers[0].self_attn))
