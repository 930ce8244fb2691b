"""Runs with LoRA: a stop and a resume change no bit, ranks share the work, and what comes out is PEFT's adapter."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from moe_dist import checkpoint
from moe_dist.config.load import build
from moe_dist.errors import UserError
from moe_dist.models.adapter import open_lora
from moe_dist.parallel.grid import Grid
from moe_dist.train import state
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.finished import export_run
from tests.methods.nexus.text import seed_folder, write_text
from tests.methods.nexus.tiny import dense_folder
from tests.models.tiny import batch, make_folder
from tests.reference import relative_error
from tests.run.runs import assert_same_bits, events, settings, stored, train

STEPS = 4
FIGURES = ("train", "eval")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_text(folder)
    seed_folder("llama", folder / "llama")
    seed_folder("mistral", folder / "mistral", dtype=torch.bfloat16)
    return folder


def lora_settings(files, run, family="llama", *, stage=1, lora=None, **train_section) -> dict:
    return settings(
        files,
        run,
        family,
        data={"train": str(files / "code.jsonl"), "eval": {"sums": {"path": str(files / "sums.jsonl"), "limit": 4}}},
        parallel={"zero_stage": stage},
        train={"steps": STEPS, "warmup_steps": 0, **train_section},
        lora={"rank": 4, **(lora or {})},
    )


@pytest.mark.parametrize(("world", "stage", "precision"), [(2, 2, "fp32"), (2, 3, "bf16")])
def test_a_stop_and_a_resume_change_no_bit(ranks, files, tmp_path, world, stage, precision):
    settings = {"stage": stage, "precision": precision, "lora": {"dropout": 0.1}, "eval_every": 2}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert set(ranks(world, train, lora_settings(files, whole, **settings))) == {0}
    for stop in (2, None):
        assert set(ranks(world, train, lora_settings(files, parted, stop_at=stop, **settings))) == {0}
    assert_same_bits(stored(parted, STEPS), stored(whole, STEPS))
    assert events(parted, *FIGURES) == events(whole, *FIGURES)


def test_ranks_and_stages_give_the_same_run_and_can_go_on_from_each_other(ranks, files, tmp_path):
    assert ranks(1, train, lora_settings(files, tmp_path / "one", stage=0)) == [0]
    assert set(ranks(4, train, lora_settings(files, tmp_path / "parted", stage=3, stop_at=2))) == {0}
    assert set(ranks(2, train, lora_settings(files, tmp_path / "parted", stage=1))) == {0}
    one, parted = (stored(tmp_path / name, STEPS) for name in ("one", "parted"))
    for key, expected in one.items():
        assert relative_error(parted[key], expected) < 1e-4, key
    losses = [[line["loss"] for line in events(tmp_path / name, "train")] for name in ("one", "parted")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_checkpoint_holds_lora_alone_and_names_its_base(ranks, files, tmp_path):
    ranks(2, train, lora_settings(files, tmp_path / "run", log_every=1))
    with checkpoint.open_checkpoint(tmp_path / "run/checkpoints/step-4") as opened:
        assert all(".lora_" in name for name in opened.catalogue)
        assert len(opened.catalogue) == 2 * 2 * 7  # A and B of seven linear layers in two blocks
        assert opened.frozen.fingerprint == checkpoint.fingerprint(files / "llama")
    table = events(tmp_path / "run", "trainable")[0]["layers"]
    assert table["outside layers"]["dense_trained"] == 0
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert table["0"]["dense_trained"] == sum(4 * (ins + outs) for ins, outs in sizes)


@pytest.mark.parametrize(
    ("family", "stage", "precision", "lora"),
    [
        ("llama", 2, "fp32", {}),
        ("llama", 3, "fp32", {"targets": "q_proj", "rank": 3, "alpha": 6.5, "dropout": 0.2}),
        ("mistral", 1, "bf16", {"alpha": 8}),
    ],
)
def test_export_writes_an_adapter_that_peft_loads(ranks, files, tmp_path, family, stage, precision, lora):
    from peft import PeftModel

    tree = lora_settings(files, tmp_path / "run", family, stage=stage, precision=precision, lora=lora)
    ranks(2, train, tree)
    folder, step = export_run(tmp_path / "run", tmp_path / "adapter")
    assert (folder, step) == (tmp_path / "adapter", STEPS)

    masters = {name: tensor for (kind, name, _), tensor in stored(tmp_path / "run", STEPS).items() if kind == "weights"}
    adapter = open_lora(folder)
    for target in adapter.targets:
        for part, tensor in zip("AB", adapter.pair(target), strict=True):
            assert torch.equal(tensor, masters[f"{target}.lora_{part}.default.weight"])
    assert adapter.base_model == str(files / family)
    assert adapter.base_fingerprint == checkpoint.fingerprint(files / family)
    assert (adapter.manifest["step"], adapter.manifest["run"]) == (STEPS, "tiny")

    config, grid = build({**tree, "model": {**tree["model"], "dtype": "float32"}}), Grid.single()
    ours = build_model(config, plan_model(config, grid), grid).eval()
    with checkpoint.open_checkpoint(tmp_path / "run/checkpoints/step-4") as opened:
        state.load_weights(opened, ours)
    base = transformers.AutoModelForCausalLM.from_pretrained(files / family, dtype=torch.float32)
    ids = batch()
    before = base(ids).logits
    loaded = PeftModel.from_pretrained(base, folder).eval()
    expected = ours(ids).logits
    assert relative_error(loaded(ids).logits, expected) < 1e-6
    assert relative_error(before, expected) > 1e-4
    assert relative_error(loaded.merge_and_unload()(ids).logits, expected) < 1e-5
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(files / family)


def test_an_adapter_of_another_base_than_the_run_s_is_not_written(ranks, files, tmp_path):
    seed_folder("llama", tmp_path / "llama", seed=1)
    write_text(tmp_path)
    ranks(1, train, lora_settings(tmp_path, tmp_path / "run", steps=1))
    seed_folder("llama", tmp_path / "llama", seed=2)
    with pytest.raises(UserError, match="not the base model of"):
        export_run(tmp_path / "run", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainable": {"include": ["*norm*"]}}, "nothing of the model itself trains"),
        ({"trainable": {"freeze_router": True}}, "nothing of the model itself trains"),
        ({"model": {"path": None, "config": {"model_type": "llama"}}}, "set model.path"),
        ({"lora": {"rank": 4, "targets": []}}, "lora.targets"),
        ({"lora": {"rank": 4, "targets": ["all-linear", "q_proj"]}}, "all-linear alone"),
        ({"lora": {"rank": -1}}, "lora.rank=-1"),
        ({"lora": {"rank": 4, "alpha": 0}}, "lora.alpha=0"),
        ({"lora": {"rank": 4, "alhpa": 2}}, "did you mean lora.alpha"),
    ],
)
def test_a_configuration_that_cannot_be(files, tmp_path, sections, message):
    tree = {**lora_settings(files, tmp_path / "run"), **sections}
    with pytest.raises(UserError, match=message):
        build(tree)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["query"], "is called query; its linear layers are down_proj, gate_proj, k_proj"),
        (["q_proj", "embed_tokens"], "embed_tokens is no linear layer"),
        (["self_attn"], "self_attn is no linear layer"),
        (["lm_head"], "shares its weight with the embedding"),
    ],
)
def test_targets_that_cannot_be(tmp_path, targets, message):
    folder = dense_folder("llama", tmp_path / "tied", tie_word_embeddings=True)
    tree = {"model": {"path": str(folder)}, "data": {"train": ["x"]}, "lora": {"rank": 4, "targets": targets}}
    with pytest.raises(UserError, match=message):
        plan_model(build(tree), Grid.single())


def test_a_model_with_routed_experts_is_refused(tmp_path):
    tree = {"model": {"path": str(make_folder("mixtral", tmp_path / "moe"))}, "data": {"train": ["x"]}}
    with pytest.raises(UserError, match="routed experts"):
        plan_model(build({**tree, "lora": {"rank": 4}}), Grid.single())
