"""E4: after training with weight decay, every tensor that was not selected has the bytes that it had."""

from __future__ import annotations

import json

import pytest
import torch

from moe_dist.config.load import build
from moe_dist.train import loop
from moe_dist.train.finished import export_run
from tests.models.compare import file_tensors
from tests.run.runs import events, make_files, settings, sha256, stored

STEPS = 30
EXPERTS = {"1": [5, 0, 2]}  # of eight: the first of two ranks has 0 to 3
PARTS = ("gate_proj", "up_proj", "down_proj")

pytestmark = pytest.mark.timeout(1200)


def train_and_name(tree: dict) -> tuple[int, set, list]:
    """On each rank: exit code, (tensor, expert) of what its optimizer steps, dtypes of the model."""
    real, seen = loop.build_engine, {}

    def build_engine(*args, **options):
        engine = real(*args, **options)
        close = engine.close

        def look_and_close() -> None:
            # From the optimizer's own tensors back to names: whatever it has stepped has a state.
            stepped = {id(flat) for flat in engine._backend.optimizer.state}
            assert {id(piece.flat) for piece in engine._backend.held} == stepped
            seen["names"] = {(f.name, f.expert) for f in engine.fragments("exp_avg")}
            seen["dtypes"] = sorted({str(p.dtype) for p in engine.module.parameters()})
            close()

        engine.close = look_and_close
        return engine

    loop.build_engine = build_engine
    try:
        code = loop.train(build(tree))
    finally:
        loop.build_engine = real
    return code, seen["names"], seen["dtypes"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_only_the_selected_experts_change(ranks, tmp_path, stage):
    files = make_files(tmp_path, "deepseek_v2", dtype=torch.bfloat16)
    (files / "experts.json").write_text(json.dumps({"experts": EXPERTS}))
    tree = settings(
        files,
        tmp_path / "run",
        "deepseek_v2",
        parallel={"expert": 2, "zero_stage": stage},
        trainable={"experts_file": str(files / "experts.json")},
        train={"steps": STEPS, "weight_decay": 0.5, "precision": "bf16"},
        moe={"balance_loss": "layer_sequence", "balance_coef": 0.01},
    )
    results = ranks(2, train_and_name, tree, timeout=300)
    assert [code for code, _, _ in results] == [0, 0]
    assert all(dtypes == ["torch.bfloat16"] for _, _, dtypes in results)

    # What the optimizer steps is what was selected, by name; so is what the checkpoint holds.
    selected = {
        (f"model.layers.{layer}.mlp.experts.{name}", expert)
        for layer, ids in EXPERTS.items()
        for expert in ids
        for name in ("gate_up_proj", "down_proj")
    }
    assert set.union(*(names for _, names, _ in results)) == selected
    assert {(name, expert) for _, name, expert in stored(tmp_path / "run", STEPS)} == selected

    export_run(tmp_path / "run", tmp_path / "export")
    before, after = (
        {name: sha256(tensor) for name, tensor in file_tensors(folder).items()}
        for folder in (files / "deepseek_v2", tmp_path / "export")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    allowed = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
        for layer, ids in EXPERTS.items()
        for expert in ids
        for part in PARTS
    }
    assert len(before) > len(allowed) + 20
    assert changed <= allowed
    windows = events(tmp_path / "run", "experts")
    reached = {
        (layer, expert)
        for layer, ids in EXPERTS.items()
        for expert in ids
        if sum(window["counts"][layer][expert] for window in windows) > 0
    }
    assert len(reached) >= 2
    assert changed >= {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight" for layer, expert in reached for part in PARTS
    }
