"""The recipe configs/nexus/quickstart.yaml with few steps: every stage, and the same command once more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moe_dist.config.load import read_mapping
from tests.models.compare import file_tensors
from tests.recipes import ROOT, run_recipe_warm

RECIPE = ROOT / "configs" / "nexus" / "quickstart.yaml"
# Few steps, short rows, and two layers; what decides how the stages fit together stays as it is.
SMALL = ["data.seq_len=64", "data.eval.help.limit=4"]
FEW = [*SMALL, "train.steps=4", "train.warmup_steps=1"]
SHORT = {
    "seed": [*FEW, "model.config.num_hidden_layers=2", "model.config.hidden_size=32"],
    **dict.fromkeys(("branch", "branch-code", "train", "train-extended"), FEW),
    **dict.fromkeys(("eval-extended", "eval-stock"), SMALL),
    **{name: ["data.seq_len=64", "nexus.documents=8"] for name in ("embed", "embed-code")},
}
FOLDERS = ("seed-model", "upcycled", "mixture-model", "extended", "model", "stock")

pytestmark = pytest.mark.timeout(1200)


def shortened(folder: Path) -> Path:
    """The recipe under `folder`, with the overrides of SHORT and absolute paths to its files."""
    tree = read_mapping(RECIPE)
    for stage in tree["stages"]:
        for kind in ("config", "script"):
            if kind in stage:
                stage[kind] = str(RECIPE.parent / stage[kind])
        if stage["name"] in SHORT:
            stage["overrides"] = [*stage["overrides"], *SHORT[stage["name"]]]
        if stage["name"] == "extend":
            stage["args"] = [*stage["args"], "data.seq_len=64", "nexus.documents=8"]
    tree["dir"] = str(folder / "run")
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_from_nothing_to_an_extended_mixture_and_nothing_twice(tmp_path, monkeypatch):
    """Every stage that writes a model is killed as soon as that is there; the same command goes on behind it."""
    recipe = shortened(tmp_path)
    first = run_recipe_warm(recipe, monkeypatch, die_at=list(FOLDERS))
    folder = tmp_path / "run"
    total = len(read_mapping(RECIPE)["stages"])
    assert f"[{total}/{total}] compare: done" in first
    assert "share of the tokens that the new expert gets" in first
    assert [first.count(f"was killed after it had made {folder / name},") for name in FOLDERS] == [1] * len(FOLDERS)

    # Every dense model is another one, and each expert is the dense model of its domain to the bit.
    places = {"seed": "seed-model", "docs": "experts/docs", "help": "experts/help", "code": "new-expert/code"}
    dense = {name: file_tensors(folder / place) for name, place in places.items()}
    upcycled, extended = file_tensors(folder / "upcycled"), file_tensors(folder / "extended")
    for layer in range(2):
        for part in ("gate", "up", "down"):
            place = f"model.layers.{layer}.mlp"
            sources = {name: tensors[f"{place}.{part}_proj.weight"] for name, tensors in dense.items()}
            assert all((sources["seed"] != sources[name]).any() for name in ("code", "docs", "help"))
            for expert, name in enumerate(("docs", "help")):
                assert (upcycled[f"{place}.experts.{expert}.{part}_proj.weight"] == sources[name]).all()
            assert (upcycled[f"{place}.shared_expert.{part}_proj.weight"] == sources["seed"]).all()
            assert (extended[f"{place}.experts.2.{part}_proj.weight"] == sources["code"]).all()

    # The stock model is the run's model: the losses of both evaluations are the same but for rounding.
    lines = [json.loads(line) for line in (folder / "extended-run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["event"] == "eval"][-1]["domains"]
    stock = json.loads((folder / "eval-stock.json").read_text())["domains"]
    before = json.loads((folder / "eval-extended.json").read_text())["domains"]
    for domain, figures in trained.items():
        assert stock[domain]["loss"] == pytest.approx(figures["loss"], abs=1e-5)
        assert set(map(len, figures["experts"].values())) == {3}
    assert trained["code"]["loss"] < before["code"]["loss"]

    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = run_recipe_warm(recipe, monkeypatch)
    assert again.count("done before, skipped") == total
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
