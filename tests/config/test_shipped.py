"""The configurations that come with the project are right, and small enough for what they promise."""

import json
from pathlib import Path

import pytest

from moe_dist.cli.main import main
from moe_dist.config.checks import accumulation, check_layout
from moe_dist.config.load import build, load, load_schema, read_mapping
from moe_dist.config.recipe import load_recipe
from moe_dist.errors import EXIT_OK, UserError
from moe_dist.methods.self_moe.composition.config import ComposeConfig
from moe_dist.methods.self_moe.config_specialise import SpecialiseConfig, load_specialising
from moe_dist.methods.self_moe.evaluation.config import EvaluateConfig
from moe_dist.methods.self_moe.generation.config import load_config as load_generation
from moe_dist.train.dry_run import describe
from tests.models.tiny import make_folder

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("file", sorted((CONFIGS / "debug").glob("*.yaml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_debug_configs_fit_one_to_four_ranks(file, world):
    config = load(file, [f"parallel.expert={world}"])
    check_layout(config, world)
    assert config.model.tokenizer == "offline"


def test_the_quickstart_goes_on_from_two_ranks_to_one():
    recipe = load_recipe(CONFIGS / "quickstart.yaml")
    first, second = (stage for stage in recipe.stages if stage.verb == "train")
    assert (first.launch, first.ranks, second.launch, second.ranks) == ("deepspeed", 2, "none", 1)
    before, after = (load(stage.config, stage.overrides, paths=False) for stage in (first, second))
    for config, ranks in ((before, 2), (after, 1)):
        check_layout(config, ranks)
    assert before.run.dir == after.run.dir
    assert before.train.stop_at < before.train.steps == after.train.steps
    assert after.train.stop_at is None
    assert accumulation(before, 2) * 2 == accumulation(after, 1)
    for stage in recipe.stages:
        if stage.config is not None:
            load(stage.config, stage.overrides, paths=False)


def test_the_papers_recipe_has_its_numbers():
    config = load(CONFIGS / "esft" / "paper.yaml")
    train = config.train
    assert (train.steps, train.global_batch_size, config.data.seq_len) == (500, 32, 4096)
    assert (train.lr, train.schedule, train.warmup_steps) == (1e-5, "constant", 0)
    assert (train.betas, train.weight_decay, train.clip_norm, train.precision) == ([0.9, 0.95], 0.1, 1.0, "bf16")
    assert (train.eval_every, config.checkpoint.keep_best, config.data.packing) == (100, True, "esft")
    for world in (2, 4, 8, 16):
        check_layout(config, world)


def test_the_papers_recipe_can_be_looked_at_without_network_or_weights(tmp_path):
    config = load(CONFIGS / "esft" / "paper.yaml")
    text = describe(config, 8)
    assert "expert-data 4 x expert 2" in text
    assert "deepseek-ai/DeepSeek-V2-Lite is on the hub" in text
    assert "step     32 sequences of 4096" in text
    # With an expert config, and a small model of the same family: what trains is what the file says.
    (tmp_path / "experts.json").write_text('{"experts": {"1": [3, 0]}, "shared_experts": true}')
    model = {"path": str(make_folder("deepseek_v2", tmp_path / "model"))}
    tree = read_mapping(CONFIGS / "esft" / "paper.yaml")
    chosen = build(tree, [f"model.path={model['path']}", f"trainable.experts_file={tmp_path / 'experts.json'}"])
    assert chosen.trainable.experts == {"1": [3, 0]}
    assert chosen.trainable.shared_experts
    assert not chosen.trainable.non_expert_modules
    assert "2/8 (0,3)" in describe(chosen, 2)
    # And without one, nothing: it is not the whole model that trains then.
    with pytest.raises(UserError, match=r"nothing would train.*trainable\.experts_file"):
        describe(build(tree, [f"model.path={model['path']}"]), 2)


def test_the_stages_of_the_esft_quickstart_fit_together():
    recipe = load_recipe(CONFIGS / "esft" / "quickstart.yaml")
    by_name = {stage.name: stage for stage in recipe.stages}
    for stage in recipe.stages:
        if stage.config is not None:
            config = load(stage.config, stage.overrides, paths=False)
            if stage.verb != "eval":  # alone, it holds all experts whatever the configuration says
                check_layout(config, stage.ranks)
    task = load(by_name["train"].config, by_name["train"].overrides, paths=False)
    assert task.checkpoint.keep_best
    assert task.model.path in by_name["base-model"].args
    assert task.trainable.experts_file in by_name["select"].args
    assert not task.trainable.non_expert_modules
    # The task's text is none of the base's.
    base = load(by_name["base"].config, by_name["base"].overrides)
    assert not {source.corpus for source in task.data.train} & {source.corpus for source in base.data.train}


def test_the_self_moe_papers_recipe_has_its_numbers_and_can_be_looked_at(tmp_path, monkeypatch, capsys):
    """Without network, weights or data: this runs in a folder that is empty but for the shipped template."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    path = "configs/self_moe/paper-gemma-7b.yaml"
    assert main(["run", path, "--dry-run"]) == EXIT_OK
    assert "[6/6] benchmarks (to do)" in capsys.readouterr().out
    stage = {stage.name: stage for stage in load_recipe(path).stages}

    out, *changes = stage["generate"].args
    assert main(["self-moe", "generate", stage["generate"].config, out, *changes, "--dry-run"]) == EXIT_OK
    planned = capsys.readouterr().out
    assert "google/gemma-7b in bfloat16 writes 5,000 records for each of 4 skill(s)" in planned
    assert "3 seeds in context, temperature 1, top-p 0.98" in planned
    assert "5 seed pairs in context, greedy" in planned

    written = tmp_path / out
    written.mkdir(parents=True)
    for skill in ("knowledge", "reasoning", "math", "coding"):
        (written / f"{skill}.jsonl").touch()
    plan = load_specialising(stage["specialise"].config, stage["specialise"].overrides)
    assert plan.deal(stage["specialise"].ranks) == [["knowledge"], ["reasoning"], ["math"], ["coding"]]
    for config in plan.experts.values():
        assert (config.model.path, config.lora.rank, config.lora.alpha) == ("google/gemma-7b", 8, 16.0)
        assert config.lora.targets == ["all-linear"]
        assert 3 * 5000 <= config.train.steps * config.train.global_batch_size < 3 * 5000 + 32
        assert (config.train.lr, config.train.global_batch_size) == (3e-4, 32)
        check_layout(config, 1)

    router = load(stage["router"].config, stage["router"].overrides, paths=False)
    check_layout(router, stage["router"].ranks)
    assert router.trainable.include == ["mixse_router.*"]
    assert router.train.steps * router.train.global_batch_size == 3 * 4 * 5000
    assert router.train.lr == 3e-4
    composed = load_schema(stage["compose"].config, stage["compose"].args[1:], ComposeConfig).compose
    assert composed.method == "mixse"
    assert (composed.router_input, composed.top_k, composed.bias) == ("base_last_hidden", 1, False)
    assert list(composed.experts) == list(plan.experts)


def test_the_stages_of_the_self_moe_quickstart_fit_together(tmp_path, monkeypatch):
    recipe = load_recipe(CONFIGS / "self_moe" / "quickstart.yaml")
    stage = {stage.name: stage for stage in recipe.stages}
    monkeypatch.chdir(tmp_path)
    Path(stage["base-model"].args[1]).mkdir(parents=True)
    generation = load_generation(stage["generate"].config, stage["generate"].args[1:])
    assert generation.filters_for("sums").check == "arithmetic"
    assert generation.filters_for("letters").check.endswith("check.py")
    assert generation.filters_for("counts").samples
    experts = load_schema(stage["specialise"].config, stage["specialise"].overrides, SpecialiseConfig)
    composed = load_schema(stage["compose"].config, stage["compose"].args[1:], ComposeConfig).compose
    router = load(stage["router"].config, stage["router"].overrides, paths=False)
    generated = stage["generate"].args[0]
    assert list(composed.experts) == [source.name for source in experts.data.train] == list(generation.generate.seeds)
    assert [source.path for source in router.data.train] == [f"{generated}/{name}.jsonl" for name in composed.experts]
    assert [source.path for source in experts.data.train] == [source.path for source in router.data.train]
    assert list(composed.experts.values()) == [f"{experts.run.dir}/{name}" for name in composed.experts]
    for name in ("base", "router"):
        check_layout(load(stage[name].config, stage[name].overrides, paths=False), stage[name].ranks)
    for name in ("base", *composed.experts, "mixture"):
        config = load_schema(stage[f"eval-{name}"].config, stage[f"eval-{name}"].args[1:], EvaluateConfig).evaluate
        assert [held_out.name for held_out in config.sets] == list(composed.experts)
        assert config.max_contamination == 0
        assert len(config.seen) == 6


def test_the_shipped_evaluation_of_self_moe_needs_only_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "held-out").mkdir()
    item = {"instruction": "What is 3 + 4?", "output": "7", "test": "assert add(3, 4) == 7"}
    for name in ("math", "knowledge", "coding"):
        (tmp_path / "held-out" / f"{name}.jsonl").write_text(json.dumps(item) + "\n")
    assert (
        main(["self-moe", "evaluate", str(CONFIGS / "self_moe" / "evaluate.yaml"), "results", "--dry-run"]) == EXIT_OK
    )
    planned = capsys.readouterr().out
    assert "math: held-out/math.jsonl, 1 items, exact_match" in planned
    assert "coding: held-out/coding.jsonl, 1 items, pass_at_1" in planned
