"""The recipe configs/self_moe/quickstart.yaml with a smaller base and few steps: every stage, and once more."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from moe_dist.config.load import read_mapping
from moe_dist.methods.self_moe.generation.checks import arithmetic
from tests.models.compare import file_tensors
from tests.recipes import ROOT, run_recipe_warm

RECIPE = ROOT / "configs" / "self_moe" / "quickstart.yaml"
SKILLS = ("sums", "letters", "counts")
FEW = ["train.steps=4", "train.warmup_steps=1"]
# Enough for the form of lists and answers, not for right ones: so nothing is checked here.
SHORT = {
    "base": ["model.config.hidden_size=64", "model.config.num_hidden_layers=2", "train.steps=150"],
    "generate": ["generate.count=6", "generate.max_prompts=32", "skill_filters={}"],
    "specialise": FEW,
    "router": FEW,
}
FOLDERS = ("base-model", "composed", "mixture", "eval-mixture", "letters-model")


def shortened(folder: Path) -> Path:
    """The recipe under `folder`, with the overrides of SHORT and absolute paths to its files."""
    tree = read_mapping(RECIPE)
    for stage in tree["stages"]:
        for kind in ("config", "script"):
            if kind in stage:
                stage[kind] = str(RECIPE.parent / stage[kind])
        given = "overrides" if "overrides" in stage else "args"
        stage[given] = [*stage[given], *SHORT.get(stage["name"], [])]
    tree["dir"] = str(folder / "run")
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def module_of(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPE.parent / "quickstart" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tasks_are_right_and_held_out_ones_are_nowhere_else(tmp_path):
    tasks, by_program = module_of("tasks"), {"sums": arithmetic.check, "letters": module_of("check").check}
    tasks.main(tmp_path)
    base = "\n".join(line["text"] for line in lines_of(tmp_path / "base.jsonl"))
    for skill in SKILLS:
        seeds, held_out = (lines_of(tmp_path / kind / f"{skill}.jsonl") for kind in ("seeds", "held-out"))
        assert (len(seeds), len(held_out)) == (100, 60)
        assert not {task["instruction"] for task in seeds} & {task["instruction"] for task in held_out}
        assert not any(f"{task['instruction']}\n" in base for task in held_out)
        assert any(f"{task['instruction']}\n" in base for task in seeds)  # so that a match above would be seen
        if skill in by_program:
            assert all(by_program[skill](task["instruction"], task["output"]) for task in seeds)
            assert not by_program[skill](seeds[0]["instruction"], seeds[0]["output"] + "1")


@pytest.mark.timeout(1200)
def test_from_nothing_to_a_mixture_and_nothing_twice(tmp_path, monkeypatch):
    """Every stage that writes a model is killed as soon as that is there; the same command goes on behind it."""
    recipe = shortened(tmp_path)
    first = run_recipe_warm(recipe, monkeypatch, die_at=list(FOLDERS))
    folder = tmp_path / "run"
    total = len(read_mapping(RECIPE)["stages"])
    assert f"[{total}/{total}] compare: done" in first
    assert "as adapter of PEFT and as merged model" in first
    assert [first.count(f"was killed after it had made {folder / name},") for name in FOLDERS] == [1] * len(FOLDERS)

    base, composed, mixture = (file_tensors(folder / name) for name in ("base-model", "composed", "mixture"))
    for name, tensor in base.items():
        assert (composed[name] == tensor).all()
        assert (mixture[name] == tensor).all()
    for skill in SKILLS:
        records = lines_of(folder / "generated" / f"{skill}.jsonl")
        assert 0 < len(records) <= 6
        assert {len(record["provenance"]["instruction"]["seeds"]) for record in records} == {3}
        expert = file_tensors(folder / "experts" / skill)
        assert any("lora_B" in name and tensor.any() for name, tensor in expert.items())
        for made in ("composed", "mixture"):
            kept = file_tensors(folder / made / "mixse" / skill)
            assert kept.keys() == expert.keys()
            assert all((kept[name] == tensor).all() for name, tensor in expert.items())
    (before,), (after,) = (file_tensors(folder / name / "mixse").values() for name in ("composed", "mixture"))
    assert before.shape == after.shape == (3, 64)
    assert (before != after).any()

    for name in ("base", *SKILLS, "mixture"):
        results = json.loads((folder / f"eval-{name}" / "results.json").read_text())
        assert {skill: row["items"] for skill, row in results["sets"].items()} == dict.fromkeys(SKILLS, 60)
        assert {row["overlap"] for row in results["contamination"].values()} == {0}
    for shares in results["routing"].values():
        assert sum(share["first"] for share in shares.values()) == pytest.approx(1)

    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = run_recipe_warm(recipe, monkeypatch)
    assert again.count("done before, skipped") == total
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
