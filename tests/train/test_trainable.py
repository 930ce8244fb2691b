"""What trains: patterns, layers and ids, and the table of it."""

from __future__ import annotations

import json

import pytest

from moe_dist.config.load import build
from moe_dist.errors import UserError
from moe_dist.parallel.grid import layout
from moe_dist.train.build import plan_model
from moe_dist.train.dry_run import describe
from moe_dist.train.table import human_bytes, optimizer_bytes, rows

ARCHITECTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}
EXPERT = 3 * 16 * 8  # elements of one expert


def config(world=1, **sections):
    return build(
        {
            "run": {"dir": "unused"},
            "model": {"config": ARCHITECTURE, "tokenizer": "unused"},
            "data": {"train": ["unused.jsonl"]},
            **sections,
        }
    )


def plan(world=1, **sections):
    configuration = config(**sections)
    return plan_model(configuration, layout(world, expert=configuration.parallel.expert))


def test_everything_trains_by_default():
    selection = plan().selection
    assert set(selection.experts.values()) == {(0, 1, 2, 3, 4, 5)}
    assert set(selection.experts) == {"model.layers.1.mlp.experts", "model.layers.2.mlp.experts"}
    assert {"lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.gate.weight"} <= selection.names


def test_experts_by_layer_and_id_leave_other_layers_frozen():
    made = plan(trainable={"include": ["*.experts.*"], "experts": {"2": [4, 1]}})
    assert made.selection.names == frozenset()
    assert made.selection.experts == {"model.layers.1.mlp.experts": (), "model.layers.2.mlp.experts": (1, 4)}
    trained = {name for name, parameter in made.skeleton.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".experts." in name} == {
        "model.layers.2.mlp.experts.trainable.gate_up_proj",
        "model.layers.2.mlp.experts.trainable.down_proj",
    }


def test_freeze_router_takes_the_routers_out():
    names = plan(trainable={"freeze_router": True}).selection.names
    assert not any(name.endswith("mlp.gate.weight") for name in names)
    assert "model.layers.0.self_attn.q_proj.weight" in names


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"include": ["*.expert.*"]}, r"'\*\.expert\.\*' matches no parameter; names look like model\.embed"),
        ({"exclude": ["*", "nothing"]}, "'nothing' matches no parameter"),
        ({"exclude": ["*"]}, "nothing would train"),
        ({"exclude": ["*.experts.down_proj"]}, "an expert trains whole or not at all"),
        ({"experts": {"0": [1]}}, r"layer\(s\) 0 have no experts; layers with experts are 1, 2"),
        ({"experts": {"1": [1, 6]}}, r"trainable\.experts\.1: no experts \[6\]; the layer has experts 0 to 5"),
        ({"exclude": ["*.experts.*"], "experts": {"1": [1]}}, "include or exclude freezes"),
    ],
)
def test_what_does_not_exist_is_an_error(section, message):
    with pytest.raises(UserError, match=message):
        plan(trainable=section)


def test_the_balanced_placement_spreads_what_trains():
    made = plan(
        world=2,
        parallel={"expert": 2, "placement": "balanced"},
        trainable={"include": ["*.experts.*"], "experts": {"1": [0, 1], "2": [0, 1, 2]}},
    )
    for name, placement in made.placement.items():
        counts = [len(set(held) & set(made.selection.experts[name])) for held in placement.ranks]
        assert max(counts) - min(counts) <= 1


def test_the_table_counts_elements_and_bytes():
    made = plan(trainable={"include": ["*.experts.*"], "experts": {"1": [0, 3]}})
    table = rows(made.skeleton, made.selection)
    assert list(table) == ["0", "1", "2", "outside layers"]
    assert (table["1"].expert_trained, table["1"].expert) == (2 * EXPERT, 6 * EXPERT)
    assert table["2"].expert_trained == table["1"].dense_trained == 0
    grid = layout(4, expert=2)
    assert optimizer_bytes(table["1"], grid, zero_stage=0, precision="fp32") == 8 * 2 * EXPERT
    assert optimizer_bytes(table["1"], grid, zero_stage=1, precision="fp32") == 12 * 2 * EXPERT // 2
    assert optimizer_bytes(table["1"], grid, zero_stage=2, precision="bf16") == 12 * 2 * EXPERT // 2


def test_a_dry_run_needs_no_weights_and_no_data():
    text = describe(config(parallel={"expert": 2}, trainable={"experts": {"1": [5]}}), 4)
    assert "4 = expert-data 2 x expert 2, ZeRO 1" in text
    assert "1/6 (5)" in text
    assert "0/6 (none)" in text
    assert "a rank before activations: weights" in text
    assert text.endswith("with activations: moe-dist plan CONFIG")


def test_a_hub_name_is_no_error_in_a_dry_run():
    text = describe(config(model={"path": "somebody/model", "config": None, "tokenizer": None}), 1)
    assert "somebody/model is on the hub" in text


def test_human_bytes():
    assert [human_bytes(size) for size in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1,023 B", "1.5 KiB", "3.0 GiB"]


def test_an_expert_config_says_what_trains(tmp_path):
    file = tmp_path / "experts.json"
    file.write_text('{"experts": {"2": [4, 1]}, "shared_experts": false, "non_expert_modules": false}')
    made = config(trainable={"experts_file": str(file)})
    # The configuration keeps what was in the file, and not the file.
    assert made.trainable.experts == {"2": [4, 1]}
    assert made.trainable.experts_file is None
    file.unlink()
    selection = plan_model(made, layout(1)).selection
    assert selection.names == frozenset()
    assert selection.experts == {"model.layers.1.mlp.experts": (), "model.layers.2.mlp.experts": (1, 4)}

    with pytest.raises(UserError, match=r"experts\.json: no such file"):
        config(trainable={"experts_file": str(file)})
    with pytest.raises(UserError, match="both say which experts train"):
        config(trainable={"experts_file": str(file), "experts": {"2": [1]}})


def test_shared_experts_and_the_rest_are_frozen_by_group():
    shared = {"shared_expert_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    model = {"config": {**ARCHITECTURE, "model_type": "qwen2_moe", **shared}}
    whole = plan(model=model).selection.names
    of_shared = {name for name in whole if ".shared_expert" in name}
    assert "model.layers.1.mlp.shared_expert_gate.weight" in of_shared
    assert plan(model=model, trainable={"shared_experts": False}).selection.names == whole - of_shared
    assert plan(model=model, trainable={"non_expert_modules": False}).selection.names == of_shared


def test_balanced_placement_takes_the_load_from_scores(tmp_path):
    file = tmp_path / "summary.json"
    scores = {"0": 0.4, "1": 0.05, "2": 0.05, "3": 0.1, "4": 0.2, "5": 0.2}
    file.write_text(json.dumps({"token_scores": {"1": scores, "2": scores}}))
    parallel = {"expert": 2, "placement": "balanced", "placement_scores": str(file)}
    trainable = {"include": ["*.experts.*"], "experts": {"2": [4, 5]}}
    made = plan(2, parallel=parallel, trainable=trainable)
    heavy, light = made.placement["model.layers.2.mlp.experts"].ranks
    assert sorted(sum(scores[str(expert)] for expert in held) for held in (heavy, light)) == pytest.approx([0.35, 0.65])
    assert {4, 5} & set(heavy)
    assert {4, 5} & set(light)
    assert plan(1, parallel={**parallel, "expert": 1}).placement == "contiguous"

    file.write_text(json.dumps({"token_scores": {"1": scores}}))
    with pytest.raises(UserError, match="0 scores for layer 2, which has 6 experts"):
        plan(2, parallel=parallel)
    with pytest.raises(UserError, match=r"only with parallel\.placement=balanced"):
        config(parallel={"placement_scores": str(file)})
