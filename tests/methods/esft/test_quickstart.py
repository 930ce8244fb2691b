"""The recipe configs/esft/quickstart.yaml with few steps: every stage, and the same command once more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moe_dist.config.load import read_mapping
from tests.models.compare import file_tensors
from tests.recipes import ROOT, run_recipe

RECIPE = ROOT / "configs" / "esft" / "quickstart.yaml"
# A model of one layer and short rows; what decides how the stages fit together stays as it is.
SHORT = {
    "base": [
        "train.steps=3", "train.warmup_steps=1", "train.decay_steps=1", "data.seq_len=64",
        "model.config.num_hidden_layers=2", "model.config.hidden_size=32", "model.config.num_experts=8",
    ],
    "score": ["data.seq_len=64"],
    "train": ["train.steps=4", "train.eval_every=2", "data.seq_len=64", "data.eval.help.limit=4"],
    "eval-base": ["data.seq_len=64"],
    "eval-merged": ["data.seq_len=64"],
}  # fmt: skip

pytestmark = pytest.mark.timeout(1200)


def shortened(folder: Path) -> Path:
    """The recipe under `folder`, with the overrides of SHORT and absolute paths to its files."""
    tree = read_mapping(RECIPE)
    for stage in tree["stages"]:
        for kind in ("config", "script"):
            if kind in stage:
                stage[kind] = str(RECIPE.parent / stage[kind])
        stage["overrides"] = [*stage.get("overrides", []), *SHORT.get(stage["name"], [])]
        if stage["name"] == "score":
            stage["args"][stage["args"].index("16384")] = "1024"
        if not stage["overrides"]:
            del stage["overrides"]
    tree["dir"] = str(folder / "run")
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_from_nothing_to_a_merged_model_and_nothing_twice(tmp_path):
    recipe = shortened(tmp_path)
    written = ["base-model", "adapter", "merged"]
    first = run_recipe(recipe, die_at=written)  # the same command again, whenever a stage was killed there
    assert [first.count(f"was killed after it had made {tmp_path / 'run' / name},") for name in written] == [1] * 3
    folder = tmp_path / "run"
    total = len(read_mapping(RECIPE)["stages"])
    assert f"[{total}/{total}] compare: done" in first

    experts = json.loads((folder / "experts.json").read_text())["experts"]
    assert set(experts) == {"0", "1"}
    assert f"{sum(map(len, experts.values()))} of 16 experts have changed, those that were selected" in first
    base, merged = file_tensors(folder / "base-model"), file_tensors(folder / "merged")
    chosen = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, ids in experts.items()
        for expert in ids
        for part in ("gate", "up", "down")
    }
    assert set(file_tensors(folder / "adapter")) == chosen
    assert {name for name in base if (base[name] != merged[name]).any()} == chosen
    losses = {name: json.loads((folder / f"eval-{name}.json").read_text())["domains"] for name in ("base", "merged")}
    assert set(losses["base"]) == set(losses["merged"]) == {"code", "docs", "help"}
    assert losses["merged"]["help"]["loss"] < losses["base"]["help"]["loss"]

    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = run_recipe(recipe)
    assert again.count("done before, skipped") == total
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
