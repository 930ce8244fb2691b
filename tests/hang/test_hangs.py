"""Ranks that have less to do than others, or something wrong, at every stage that cuts and reduces."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dist.errors import EXIT_OK
from tests.hang import scripted
from tests.hang.scripted import (
    FEW,
    FULL,
    HARMED,
    INF_GRADIENT,
    NAN_GRADIENT,
    NAN_LOSS,
    PADDING,
    RANK_PADDING,
)
from tests.run.runs import assert_same_bits, events, make_files, same_bits, settings, stored, trainer_state

SECONDS = 240  # a few are enough where the cores are free
# (ranks, which are all one expert group; ZeRO stage; precision)
LAYOUTS = [
    (ranks, stage, precision) for ranks in (2, 4) for stage, precision in ((1, "bf16"), (2, "fp32"), (3, "bf16"))
]
# How tokens travel in each: half of the ranks are a node.
WAYS = dict(zip(LAYOUTS, ("alltoall", "dedup", "node", "dedup", "node", "alltoall"), strict=True))
NAMES = [f"ep{ranks}-zero{stage}-{precision}-{way}" for (ranks, stage, precision), way in WAYS.items()]
FIRST_RANK_ONLY = {"include": ["*.experts.*"], "experts": {"1": [0]}}
SHUNNED = range(4, 8)  # the second half of the experts

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "deepseek_v3")


def run_settings(files, run, layout, steps, **sections) -> dict:
    ranks, stage, precision = layout
    sections["moe"] = {
        "expert_bias_rate": 1e-3,
        "balance_loss": "layer_global",
        "dispatcher": WAYS[layout],
        **sections.get("moe", {}),
    }
    sections["train"] = {
        "steps": len(steps),
        "global_batch_size": 2 * ranks,
        "precision": precision,
        **sections.get("train", {}),
    }
    return settings(
        files,
        run,
        "deepseek_v3",
        parallel={"expert": ranks, "zero_stage": stage, "reduce_bucket_size": 4000, "node_size": ranks // 2},
        checkpoint={"every": 1, "keep": 20},
        **sections,
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_padding_and_harm_on_one_rank(ranks, files, tmp_path, layout):
    steps = (FULL, NAN_LOSS, RANK_PADDING, PADDING, FEW, NAN_GRADIENT, INF_GRADIENT, FULL)
    tree = run_settings(files, tmp_path, layout, steps)
    assert set(ranks(layout[0], scripted.train, tree, steps, timeout=SECONDS)) == {EXIT_OK}
    skipped = [number for number, kind in enumerate(steps, 1) if kind in HARMED]
    assert [line["step"] for line in events(tmp_path, "skipped")] == skipped
    after = {number: stored(tmp_path, number) for number in range(1, len(steps) + 1)}
    for before, number in pairwise(after):
        if number in skipped:
            assert_same_bits(after[number], after[before])
        else:
            moved = [key for key in after[number] if not same_bits(after[number][key], after[before][key])]
            assert moved, f"step {number} ({steps[number - 1]}) has changed nothing"
        assert all(tensor.isfinite().all() for tensor in after[number].values())
    counted = [trainer_state(tmp_path, number)["adam_step"] for number in after]
    assert counted == [number - sum(step <= number for step in skipped) for number in after]
    losses = {line["step"]: line["loss"] for line in events(tmp_path, "train")}
    assert losses[steps.index(PADDING) + 1] == 0.0


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_a_rank_whose_experts_are_all_frozen(ranks, files, tmp_path, layout):
    steps = (FULL, RANK_PADDING, NAN_GRADIENT, FEW, FULL)
    tree = run_settings(files, tmp_path, layout, steps, trainable=FIRST_RANK_ONLY, moe={"expert_bias_rate": 0.0})
    assert set(ranks(layout[0], scripted.train, tree, steps, timeout=SECONDS)) == {EXIT_OK}
    assert {expert for kind, _, expert in stored(tmp_path, len(steps)) if kind != "buffers"} == {0}
    assert_same_bits(stored(tmp_path, 3), stored(tmp_path, 2))


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_a_rank_whose_experts_get_no_token(ranks, files, tmp_path, layout):
    folder = make_files(tmp_path, "deepseek_v3") / "deepseek_v3"
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][list(SHUNNED)] = -1e3
    save_file(tensors, file, metadata={"format": "pt"})
    steps = (FULL, RANK_PADDING, FULL)
    tree = run_settings(tmp_path, tmp_path / "run", layout, steps)
    assert set(ranks(layout[0], scripted.train, tree, steps, timeout=SECONDS)) == {EXIT_OK}
    assert all(line["layers"]["1"]["dead"] >= len(SHUNNED) for line in events(tmp_path / "run", "train"))
    for (kind, _, expert), tensor in stored(tmp_path / "run", len(steps)).items():
        if kind == "exp_avg" and expert >= 0:
            assert tensor.any() == (expert not in SHUNNED), f"expert {expert}"
            assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_all_ranks_give_up_together(ranks, files, tmp_path, layout):
    steps = (FULL, NAN_LOSS, FULL, NAN_GRADIENT, NAN_LOSS, NAN_GRADIENT, FULL)
    tree = run_settings(files, tmp_path, layout, steps, train={"max_skips": 2})
    messages = ranks(layout[0], scripted.train, tree, steps, timeout=SECONDS)
    assert len(set(messages)) == 1
    assert "3 step(s) in a row up to step 6" in str(messages[0])
    assert [line["step"] for line in events(tmp_path, "skipped")] == [2, 4, 5, 6]
    assert_same_bits(stored(tmp_path, 5), stored(tmp_path, 3))
