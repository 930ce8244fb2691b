"""A hundred AdamW steps with weight decay on a few experts: nothing else changes a bit or costs optimizer memory."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from moe_dist.config.load import build
from moe_dist.models import load_model, moe_layers
from moe_dist.train import loop
from moe_dist.train.finished import export_run
from tests.models.compare import file_tensors
from tests.run.runs import make_files, same_bits, settings, sha256, stored

STEPS = 100
EXPERTS = {0: (1, 5), 1: (0, 2, 4, 6)}  # of seven: the first rank has 0 to 3, the second 4 to 6

pytestmark = pytest.mark.timeout(1200)


def train_and_look(tree: dict) -> dict:
    """On each rank: hashes of all parameters before and after the run, and the optimizer's state in numbers."""
    looked: dict = {}

    def hashes(engine) -> dict:
        trains = {name: parameter.requires_grad for name, parameter in engine.module.named_parameters()}
        return {name: (trains[name], sha256(tensor)) for name, tensor in engine.full_parameters()}

    def build_and_look(*args, **options):
        engine = real(*args, **options)
        looked["before"] = hashes(engine)
        close = engine.close

        def look_and_close() -> None:
            looked["after"] = hashes(engine)
            states = engine._backend.optimizer.state.values()
            looked["elements"] = {kind: sum(s[kind].numel() for s in states) for kind in ("exp_avg", "exp_avg_sq")}
            close()

        engine.close = look_and_close
        return engine

    real = loop.build_engine
    with patch.object(loop, "build_engine", build_and_look):
        looked["code"] = loop.train(build(tree))
    return looked


def test_only_the_chosen_experts_change(ranks, tmp_path):
    files = make_files(tmp_path, "qwen3_moe")
    tree = settings(
        files,
        tmp_path / "run",
        "qwen3_moe",
        parallel={"expert": 2, "zero_stage": 2},
        trainable={"include": ["*.experts.*"], "experts": {str(k): list(v) for k, v in EXPERTS.items()}},
        train={"steps": STEPS, "weight_decay": 0.5, "log_every": 50},
        moe={"balance_loss": "hf"},
    )
    results = ranks(2, train_and_look, tree, timeout=600)
    for result in results:
        assert result["code"] == 0
        assert result["before"].keys() == result["after"].keys()
        frozen = [name for name, (trains, _) in result["before"].items() if not trains]
        assert len(frozen) > 10
        assert [name for name in frozen if result["before"][name] != result["after"][name]] == []
        trained = [name for name, (trains, _) in result["before"].items() if trains]
        assert len(trained) == 4  # two products of two layers
        assert all(result["before"][name] != result["after"][name] for name in trained)

    # Two fp32 moments for each element of a chosen expert, and for nothing else.
    model = load_model(files / "qwen3_moe")
    of_an_expert = sum(parameter[0].numel() for _, parameter, _ in moe_layers(model)[0][1].expert_parameters())
    chosen = sum(map(len, EXPERTS.values()))
    for kind in ("exp_avg", "exp_avg_sq"):
        assert sum(result["elements"][kind] for result in results) == chosen * of_an_expert
    checkpoint = stored(tmp_path / "run", STEPS)
    assert {(name.split(".")[2], expert) for _, name, expert in checkpoint} == {
        (str(layer), expert) for layer, experts in EXPERTS.items() for expert in experts
    }
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.values())

    export_run(tmp_path / "run", tmp_path / "export")
    before, after = file_tensors(files / "qwen3_moe"), file_tensors(tmp_path / "export")
    assert before.keys() == after.keys()
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert changed == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, experts in EXPERTS.items()
        for expert in experts
        for part in ("gate", "up", "down")
    }
