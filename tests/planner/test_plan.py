"""`moe-dist plan`: what it prints, what it refuses, and that a plan for many GPUs takes seconds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moe_dist.cli.main import main
from moe_dist.config.load import load
from moe_dist.errors import EXIT_OK, EXIT_USER
from moe_dist.planner.anatomy import Layout
from moe_dist.planner.hardware import GPUS, Cluster
from moe_dist.planner.search import evaluate, layout_of, rank
from moe_dist.planner.study import Study
from moe_dist.train.dry_run import describe

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = str(CONFIGS / "debug" / "tiny.yaml")
SCALE = {"mixtral-8x7b": (64, 46.7e9), "qwen3-30b-a3b": (16, 30.5e9), "deepseek-v3": (1024, 671.0e9)}


def test_the_plan_of_a_config_names_every_part(capsys):
    assert main(["plan", TINY, "--gpus", "8", "--best", "3", "parallel.expert=4", "parallel.tensor=2"]) == EXIT_OK
    text = capsys.readouterr().out
    for part in ("weights", "masters", "moments", "gradients", "activations", "experts", "tensor", "data, dense"):
        assert part in text
    assert "989 TFLOP/s" not in text, "an fp32 run does not reach the rate of bf16"
    assert "67 TFLOP/s in fp32" in text
    assert "best     of" in text
    assert "left out" in text


def test_every_assumption_can_be_set(capsys):
    options = ["--gpu", "b200", "--node-size", "4", "--achieved", "0.3", "--moved", "0.5", "--usable", "0.8"]
    figures = ["--tflops", "100", "--memory-gb", "10", "--inside-gbps", "80", "--across-gbps", "8"]
    figures += ["--memory-tbps", "2", "--begin-us", "7", "--inside-us", "3", "--across-us", "11", "--launch-us", "0"]
    assert main(["plan", TINY, "--gpus", "8", "--no-rank", *options, *figures, "train.global_batch_size=16"]) == EXIT_OK
    text = capsys.readouterr().out
    assert "8 x b200, 4 a node" in text
    assert "100 TFLOP/s in fp32, of which products reach 30%" in text
    assert "of 10 GB/s inside a node, 1 GB/s a GPU across, of which exchanges reach 50%" in text
    assert "7.5 GiB of 9.3 for tensors (80%)" in text
    assert "begins in 7 us, and takes 3 us a partner inside a node, 11 us across; the host needs 0 us" in text
    assert "weights are read at 2 TB/s" in text
    assert "best" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "2000"], "1 to 1024 GPUs"),
        (["--gpus", "-1"], "1 to 1024 GPUs"),
        (["--gpu", "v100"], "known are a100, h100, h200, b200"),
        (["--achieved", "1.5"], "at most 1"),
        (["--moved", "0"], "above 0"),
        (["--launch-us", "-1"], "--launch-us -1.0: has to be at least 0"),
        (["--gpus", "6", "parallel.expert=4", "--no-rank"], "parallel.expert=4"),
        (["model.path=owner/name", "model.config=null"], "config.json"),
    ],
)
def test_bad_input_is_refused(capsys, options, message):
    assert main(["plan", TINY, *options]) == EXIT_USER
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", SCALE)
def test_the_scale_configs_pass_a_dry_run_and_fit_their_cluster(name):
    world, parameters = SCALE[name]
    config = load(CONFIGS / "scale" / f"{name}.yaml")
    assert config.parallel.world_size == world
    assert f"{world} = pipeline" in describe(config, world)
    study = Study(config)
    assert sum(parameter.numel() for parameter in study.skeleton.parameters()) == pytest.approx(parameters, rel=5e-3)
    found = evaluate(study, layout_of(config, world), Cluster(GPUS["h100"], world))
    assert found.memory.total < Cluster(GPUS["h100"], world).room


def test_sharing_more_takes_less_memory_and_one_rank_sends_nothing():
    study = Study(load(TINY))
    totals = [study.memory(Layout(8, expert=2, zero_stage=stage)).total for stage in (0, 1)]
    assert totals == sorted(totals, reverse=True)
    assert study.memory(Layout(8, expert=8)).weights < study.memory(Layout(8, expert=2)).weights
    assert study.memory(Layout(1, recompute=True)).activations < study.memory(Layout(1)).activations
    assert study.wire(Layout(1), 0).total == 0


def test_work_is_shared_by_the_axes_and_counted_once():
    study = Study(load(TINY))
    whole = study.work(Layout(1), 0)
    stages = Layout(2, pipeline=2)
    assert study.work(stages, 0) + study.work(stages, 1) == whole
    # Heads, columns and vocabulary are dealt out, tokens too; norms of heads count nothing.
    assert study.work(Layout(2, tensor=2), 0) == pytest.approx(whole / 2, rel=1e-6)
    assert study.work(Layout(2, sequence=2), 0) == pytest.approx(whole / 2, rel=1e-6)
    tokens = study.config.data.seq_len
    # Six operations a token and weight that it meets, and attention between tokens.
    met = sum(parameter.numel() for name, parameter in study.skeleton.named_parameters() if "experts" not in name)
    met -= study.skeleton.get_input_embeddings().weight.numel()
    met += 2 * 2 * 3 * 64 * 32  # layers · K · matrices · hidden · width
    attention = 2 * 7 * 4 * 128 * 128 // 2 * 2 * 16  # layers · products there and back · heads · pairs · 2 · width
    assert whole == pytest.approx(6 * tokens * met + attention, rel=0.02)


def test_the_ranking_is_in_order_fits_and_counts_what_it_leaves_out():
    study = Study(load(TINY))
    fastest = rank(study, Cluster(GPUS["a100"], 64), sequences=64, wanted=1).best[0]
    small = Cluster(GPUS["a100"], 64, usable=(fastest.memory.total - 1) / GPUS["a100"].memory)
    ranking = rank(study, small, sequences=64, wanted=5)
    assert len(ranking.best) == 5
    assert all(found.memory.total <= small.room for found in ranking.best)
    assert fastest.layout not in [found.layout for found in ranking.best]
    assert [found.speed.step for found in ranking.best] == sorted(found.speed.step for found in ranking.best)
    assert any("memory" in reason for reason in ranking.left_out)
    assert ranking.looked_at == 5 + sum(ranking.left_out.values())


def test_a_thousand_gpus_are_planned_in_seconds():
    study = Study(load(CONFIGS / "scale" / "mixtral-8x7b.yaml"))
    started = time.process_time()
    ranking = rank(study, Cluster(GPUS["h100"], 1024), sequences=4096)
    assert ranking.looked_at > 1000
    assert ranking.best
    assert time.process_time() - started < 30
