"""Initialising: the same model on any grid, sensible values, loadable after export."""

from __future__ import annotations

import pytest
import torch

from moe_dist.errors import UserError
from moe_dist.models import export_model, init_model, load_model
from moe_dist.parallel.grid import build_grid
from tests.models.compare import file_tensors, same_bits
from tests.models.tiny import CONFIGS


def _inline(family, **changes):
    return {"model_type": family, **CONFIGS[family], **changes}


@pytest.mark.parametrize("family", CONFIGS)
def test_values_follow_the_family_s_rule(family):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = init_model(_inline(family, initializer_range=0.3), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, tensor in model.state_dict().items():
        assert not tensor.is_meta, name
        if "experts" in name and tensor.dim() == 3:
            assert tensor.std().item() == pytest.approx(0.3, rel=0.1), name
            assert len({row.sum().item() for row in tensor}) == len(tensor), name
        if "norm" in name:
            assert (tensor == 1).all(), name


def test_the_seed_decides(tmp_path):
    first, same, other = (init_model(_inline("qwen3_moe"), seed=seed).state_dict() for seed in (1, 1, 2))
    same_bits(same, first)
    name = "model.layers.0.mlp.experts.trainable.down_proj"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("layers.0", "layers.1")])


def _export_initialised(family, dtype, out):
    grid = build_grid(expert=2)
    export_model(init_model(_inline(family), grid, seed=4, dtype=dtype), out)


@pytest.mark.parametrize(("family", "dtype"), [("qwen3_moe", "float32"), ("gpt_oss", "bfloat16")])
def test_equal_at_any_expert_parallel_size(ranks, tmp_path, family, dtype):
    alone = init_model(_inline(family), seed=4, dtype=dtype)
    export_model(alone, tmp_path / "alone")
    ranks(2, _export_initialised, family, dtype, tmp_path / "together")
    same_bits(file_tensors(tmp_path / "together"), file_tensors(tmp_path / "alone"))
    same_bits(load_model(tmp_path / "alone").state_dict(), alone.state_dict())


def test_tied_embeddings_and_fp32_bias():
    model = init_model(_inline("deepseek_v3", tie_word_embeddings=True), dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_bad_configurations():
    with pytest.raises(UserError, match="not a known MoE family"):
        init_model({"model_type": "llama", "num_hidden_layers": 1})
    with pytest.raises(UserError, match="None"):
        init_model({"hidden_size": 8})
