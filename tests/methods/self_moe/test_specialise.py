"""`moe-dist self-moe specialise`: the adapters of one launch are those of as many separate runs with LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from moe_dist.cli.main import main
from moe_dist.config.load import load
from moe_dist.config.strict_json import read_json
from moe_dist.errors import EXIT_OK, UserError
from moe_dist.methods.self_moe.config_specialise import load_specialising
from moe_dist.methods.self_moe.specialise import specialise
from moe_dist.models.adapter import open_lora
from moe_dist.train import loop
from moe_dist.train.finished import export_run
from tests.methods.nexus.text import seed_folder, write_text
from tests.models.tiny import make_folder
from tests.pool import RankPool

SKILLS = ("code", "prose", "sums")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration of three skills."""
    folder = tmp_path_factory.mktemp("specialise")
    files = write_text(folder)
    tree = {
        "model": {"path": str(seed_folder("llama", folder / "base"))},
        "data": {
            "train": {name: {"path": files[name]} for name in SKILLS},
            "eval": {name: {"path": files[name]} for name in ("code", "sums")},
            "seq_len": 24,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"steps": 4, "global_batch_size": 4, "lr": 0.02, "eps": 1e-6, "precision": "fp32"},
        "checkpoint": {"every": 2},
    }
    (folder / "specialise.yaml").write_text(yaml.safe_dump(tree))
    (folder / "train.yaml").write_text(yaml.safe_dump({**tree, "lora": {"rank": 8}}))
    return folder


@pytest.fixture(scope="module")
def pool():
    """Ranks of our own: the world that they form is cut up and formed anew."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def alone(folder, ranks):
    """{skill: tensors} of separate runs."""
    return ranks(1, separately, folder, timeout=120)[0]


def separately(folder) -> dict:
    for name in SKILLS:
        source = f"data.train={{{name}: {{path: {folder}/{name}.jsonl}}}}"
        out = folder / "alone" / name
        assert loop.train(load(folder / "train.yaml", [source, f"run.name={name}", f"run.dir={out}-run"])) == EXIT_OK
        export_run(f"{out}-run", out)
    return {name: tensors(folder / "alone" / name) for name in SKILLS}


def together(folder, out, *words) -> int:
    return specialise(load_specialising(folder / "specialise.yaml", [f"run.dir={out}", *words]))


def tensors(folder) -> dict[str, torch.Tensor]:
    adapter = open_lora(folder)
    return {key: adapter.files.read(key).clone() for key in adapter.files.tensors}


def test_two_groups_train_what_separate_runs_do(folder, alone, pool):
    out = folder / "two"
    assert pool.run(together, folder, out, timeout=120) == [EXIT_OK] * 2
    for name in SKILLS:
        found = tensors(out / name)
        assert found.keys() == alone[name].keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in alone[name].items())
        assert open_lora(out / name).manifest["data"] == {name: str(folder / f"{name}.jsonl")}
    assert not torch.equal(*(next(iter(tensors(out / name).values())) for name in ("code", "sums")))
    losses = read_json(out / "specialise.json")
    assert set(losses) == {"base", *SKILLS}
    for skill in ("code", "sums"):
        assert losses[skill][skill]["loss"] < min(losses[name][skill]["loss"] for name in losses if name != skill)


def test_the_same_command_again_does_what_is_left(folder, alone, ranks):
    out = folder / "again"
    stop = f"specialise.overrides={{prose: [data.train.prose.path={folder}/nothing.jsonl]}}"
    (folder / "nothing.jsonl").write_text("{}\n")
    said = ranks(1, refused, folder, out, stop, timeout=120)[0]
    assert "nothing.jsonl:1" in said
    assert sorted(path.name for path in out.iterdir()) == ["code", "runs"]
    before = {path: path.stat().st_mtime_ns for path in (out / "code").iterdir()}
    assert ranks(1, together, folder, out, timeout=120) == [EXIT_OK]
    assert before == {path: path.stat().st_mtime_ns for path in (out / "code").iterdir()}
    for name in SKILLS:
        assert all(torch.equal(found, alone[name][key]) for key, found in tensors(out / name).items())


def test_m10_instance_is_one_expert_on_all_skills(folder, ranks):
    out = folder / "instance"
    assert ranks(1, together, folder, out, "specialise.instance=true", timeout=120) == [EXIT_OK]
    manifest = open_lora(out / "instance").manifest
    assert set(manifest["data"]) == set(SKILLS)
    assert manifest["step"] == 3 * 4
    data = [json.loads(line) for line in (out / "runs/instance/metrics.jsonl").read_text().splitlines()]
    assert next(line for line in data if line["event"] == "data")["train"].keys() == set(SKILLS)
    assert set(read_json(out / "specialise.json")) == {"base", "instance"}


def refused(folder, out, *words) -> str:
    try:
        together(folder, out, *words)
    except UserError as error:
        return str(error)
    return "not refused"


def test_dry_run_says_who_trains_what(folder, capsys):
    words = [str(folder / "specialise.yaml"), f"run.dir={folder}/dry"]
    assert main(["self-moe", "specialise", *words, "--dry-run", "--ranks", "2"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "2 rank(s) as 2 group(s) of 1\ngroup 1  code, sums\ngroup 2  prose\n" in said
    assert "0 of 20,512" in said  # what lies outside of the layers
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.rank=0"], "lora.rank=0: has to be at least 1"),
        (["data.train=[]"], "give one source for each skill"),
        (["data.train={runs: {corpus: prose}}"], "a skill cannot be called 'runs'"),
        (["model.path=null"], "set model.path"),
        (["trainable.include=['*']", "trainable.freeze_router=true"], "nothing of the model itself trains"),
        (["specialise.overrides={law: [train.steps=1]}"], "no such skill; there is code"),
        (["specialise.instances=true"], "did you mean specialise.instance"),
        (["specialise.overrides={code: [model.path=./other]}"], "model.path"),
    ],
)
def test_mistakes_in_the_configuration(folder, words, message):
    with pytest.raises(UserError, match=message):
        load_specialising(folder / "specialise.yaml", words)


def test_a_base_with_routed_experts_and_unknown_targets_are_refused_before_anything_is_written(folder, ranks, tmp_path):
    moe = make_folder("olmoe", tmp_path / "moe")
    assert "routed experts" in ranks(1, refused, folder, tmp_path / "a", f"model.path={moe}")[0]
    assert "nothing in this model is called wq" in ranks(1, refused, folder, tmp_path / "b", "lora.targets=[wq]")[0]
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_the_shipped_configuration_has_the_papers_numbers(tmp_path, monkeypatch):
    shipped = Path(__file__).parents[3] / "configs/self_moe/specialise.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "generated").mkdir()
    for skill in ("knowledge", "reasoning", "math", "coding"):
        (tmp_path / f"generated/{skill}.jsonl").touch()
    plan = load_specialising(shipped)
    for config in plan.experts.values():
        lora, train = config.lora, config.train
        assert (lora.rank, lora.alpha, lora.targets) == (8, 16, ["all-linear"])
        assert (train.lr, train.global_batch_size, train.steps) == (3e-4, 32, round(3 * 5000 / 32))
        assert config.data.packing is False
    assert [len(plan.deal(ranks)) for ranks in (1, 2, 4, 8)] == [1, 2, 4, 4]
    instance = load_specialising(shipped, ["specialise.instance=true"])
    assert [config.train.steps for config in instance.experts.values()] == [4 * 469]
