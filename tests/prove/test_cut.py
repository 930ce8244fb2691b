"""Cutting a model to a few layers: which ones, and that what is left is the user's own."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from moe_dist.config.load import build
from moe_dist.errors import UserError
from moe_dist.parallel.grid import Grid
from moe_dist.prove.layers import Layer, check_layers, choices
from moe_dist.prove.pose import pose
from tests.models.tiny import VOCAB, make_folder

DEEP = {
    "mixtral": {},
    "qwen2_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [3]},  # layers 1 and 5 have experts
    "deepseek_v3": {"first_k_dense_replace": 3},
    "gpt_oss": {},
}
ERNIE = {"moe_layer_start_index": 2, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}


def posed(tmp_path, folder, *, layers=None, trainable=None, pipeline=1):
    tree = {
        "model": {"path": str(folder)},
        "data": {"train": ["unused.jsonl"]},
        "parallel": {"pipeline": pipeline},
        "trainable": trainable or {},
    }
    work = tmp_path / "work"
    work.mkdir()
    return pose(build(tree), work, Grid.single(), layers=layers)


@pytest.mark.parametrize(
    ("found", "routed", "stages", "kept"),
    [
        ("aaaa", [True] * 4, 1, [0, 1]),
        ("abbb", [False, True, True, True], 1, [0, 1, 2]),
        ("abbcb", [False, True, True, True, True], 1, [0, 1, 3]),
        ("aaaa", [True] * 4, 3, [0, 1, 2]),
        ("ab", [False, True], 2, [0, 1]),
        ("a", [True], 1, [0]),
        ("aabb", [False] * 4, 3, [0, 1, 2]),
    ],
)
def test_each_kind_once_and_experts_for_each_stage(found, routed, stages, kept):
    layers = [Layer(kind, has, False) for kind, has in zip(found, routed, strict=True)]
    assert list(choices(layers, stages=stages)) == [kept]


def test_further_choices_add_layers_that_train():
    layers = [Layer(kind, True, kind == "t") for kind in "attaat"]
    assert list(choices(layers, stages=1)) == [[0, 1], [0, 1, 2], [0, 1, 2, 5]]


@pytest.mark.parametrize("layers", [[0, 9], [1, 1], [0]])
def test_layers_that_cannot_be_kept(layers):
    with pytest.raises(UserError, match="--layers"):
        check_layers(layers, 4, stages=2)


@pytest.mark.parametrize("family", DEEP)
@pytest.mark.parametrize("layers", [[0, 5], [1, 2, 5]])
def test_what_is_left_computes_as_these_layers_of_the_whole_model(tmp_path, family, layers):
    folder = make_folder(family, tmp_path / "whole", num_hidden_layers=6, **DEEP[family])
    problem, _ = posed(tmp_path, folder, layers=layers)
    load = transformers.AutoModelForCausalLM.from_pretrained
    whole, cut = load(folder).eval(), load(problem.config.model.path).eval()
    whole.model.layers = nn.ModuleList([whole.model.layers[index] for index in layers])
    if hasattr(whole.config, "layer_types"):
        whole.config.layer_types = [whole.config.layer_types[index] for index in layers]
    whole.config.num_hidden_layers = len(layers)
    ids_BL = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (model(input_ids=ids_BL, use_cache=False).logits for model in (whole, cut))
    assert torch.equal(found, expected)
    assert problem.original("model.layers.1.mlp.gate.weight") == f"model.layers.{layers[1]}.mlp.gate.weight"


def test_a_trainable_set_keeps_its_layers_and_ids(tmp_path):
    """ESFT of two layers: one that trains, one with experts that does not, and the dense one."""
    folder = make_folder("deepseek_v3", tmp_path / "whole", num_hidden_layers=6)
    experts = {"include": ["*.experts.*", "*.layers.4.self_attn.*"], "experts": {"4": [1, 6], "5": [2]}}
    problem, selection = posed(tmp_path, folder, trainable=experts)
    assert problem.kept == (0, 1, 4, 5)  # 4 and 5 are two kinds: attention trains in one of them
    assert selection.experts == {
        "model.layers.1.mlp.experts": (),
        "model.layers.2.mlp.experts": (1, 6),
        "model.layers.3.mlp.experts": (2,),
    }
    assert selection.names
    assert all(name.startswith("model.layers.2.self_attn.") for name in selection.names)


def test_a_family_that_counts_its_layers_in_its_own_way_keeps_all_up_to_the_last(tmp_path):
    """Where experts begin is a number there that the cut does not know: layer 3 cannot come second."""
    folder = make_folder("mixtral", tmp_path / "x")  # for its sizes
    sizes = transformers.AutoConfig.from_pretrained(folder).to_dict()
    wanted = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    config = transformers.AutoConfig.for_model(
        "ernie4_5_moe", **{key: sizes[key] for key in wanted}, num_hidden_layers=5, **ERNIE
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "ernie")
    with pytest.raises(UserError, match="--layers 0,1,2,3"):
        posed(tmp_path, tmp_path / "ernie", layers=[0, 3])
    (tmp_path / "work").rmdir()
    problem, _ = posed(tmp_path, tmp_path / "ernie")
    assert problem.kept == (0, 1, 2, 3)


def test_random_numbers_are_switched_off_and_said(tmp_path):
    folder = make_folder("mixtral", tmp_path / "whole", attention_dropout=0.1, router_jitter_noise=0.01)
    problem, _ = posed(tmp_path, folder)
    assert {note.split()[0] for note in problem.notes} >= {"attention_dropout", "router_jitter_noise"}
    assert transformers.AutoConfig.from_pretrained(problem.config.model.path).attention_dropout == 0
