"""What an attacker, or carelessness, puts into configurations, models, checkpoints and names."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest

from moe_dist import checkpoint
from moe_dist.config.load import build
from moe_dist.errors import EXIT_OK, EXIT_USER, UserError
from tests.checkpoint.damage import trust
from tests.faults.loggers import in_place_of_wandb
from tests.run.processes import REPOSITORY, write_config
from tests.run.runs import make_files, settings
from tests.run.test_bad_input import called, refused

PATIENCE = 240
SECRET, KEY = "hunter2-in-the-environment", "sk-abcdefghijklmnopqrstuv"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_fault_35_a_configuration_cannot_run_code(ranks, files, tmp_path):
    run, canary = tmp_path / "run", tmp_path / "canary"
    good = settings(files, run, "qwen3_moe")
    hostile = {
        "object": f"logging: !!python/object/apply:os.system ['touch {canary}']",
        "new": f"logging: !!python/object/new:subprocess.Popen [['touch', '{canary}']]",
        "name": "logging: !!python/name:os.system",
        "environment": json.dumps({**good, "logging": {"project": "${oc.env:CANARY}"}}),
        "laughs": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "large": "# " + "x" * 10_000_000,
        "deep": "a: " + "[" * 10_000,
    }
    calls = []
    for name, text in hostile.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        calls.append(["train", str(tmp_path / f"{name}.yaml")])
    (results,) = ranks(1, called, *calls, timeout=PATIENCE)
    for name, result in zip(hostile, results, strict=True):
        refused(run, result, f"{name}.yaml")
    assert not canary.exists()


def run_with_secrets(words: list[str]) -> tuple[int, str, str, dict]:
    """On a rank: a run with keys in its environment, and the configuration that wandb was given."""
    wandb = MagicMock()
    with patch.dict(os.environ, {"WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET}), in_place_of_wandb(wandb):
        ((code, out, err),) = called(words)
    return code, out, err, wandb.init.call_args.kwargs["config"]


def test_fault_35_secrets_reach_no_file_no_log_and_no_logger(ranks, files, tmp_path):
    run = tmp_path / "run"
    tree = settings(files, run, "qwen3_moe", logging={"wandb": "online", "tags": [f"made with {KEY}"]})
    words = ["train", str(write_config(tree, tmp_path / "c.yaml")), "train.steps=1"]
    ((code, out, err, given),) = ranks(1, run_with_secrets, words, timeout=PATIENCE)
    assert code == EXIT_OK, err
    written = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.resolved.yaml", "env.json", "metrics.jsonl", "trainer_state.json"} <= {p.name for p in written}
    for name, data in [(str(path), path.read_bytes()) for path in written] + [("output", (out + err).encode())]:
        assert SECRET.encode() not in data, name
        assert KEY.encode() not in data, name
    assert given["logging"]["tags"] == ["made with <redacted>"]
    assert given["train"]["steps"] == 1


@pytest.mark.parametrize("place", ["../../etc", "runs/../../up", "/tmp/../etc/run"])
def test_fault_36_a_run_folder_cannot_climb(place):
    with pytest.raises(UserError, match=r"must not climb"):
        build({"model": {"path": "org/name"}, "run": {"dir": place}})


def test_fault_36_a_folder_of_somebody_else_is_left_alone(ranks, files, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "passwd").write_text("precious")
    (tmp_path / "link").symlink_to(other)
    words = [str(write_config(settings(files, tmp_path / "link", "qwen3_moe"), tmp_path / "c.yaml"))]
    (results,) = ranks(1, called, ["train", *words], ["train", *words, "--overwrite"], timeout=PATIENCE)
    for code, _, err in results:
        assert code == EXIT_USER
        assert "is not empty and holds no run of ours" in err
    assert {path.name for path in other.iterdir()} == {"passwd"}


def test_fault_36_no_archive_is_ever_unpacked():
    unpackers = {"tarfile", "zipfile", "patoolib", "libarchive"}
    for file, tree in sources():
        names = {name.split(".")[0] for node in ast.walk(tree) for name in imported(node)}
        assert not names & unpackers, file
        assert "unpack_archive" not in file.read_text(), file


def test_fault_37_nothing_of_ours_can_read_a_pickle():
    for file, tree in sources():
        names = {name for node in ast.walk(tree) for name in imported(node)}
        assert not {name for name in names if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib")}, file
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "numpy.load", "np.load", "pd.read_pickle"}, file


def sources() -> list[tuple[Path, ast.Module]]:
    files = sorted((REPOSITORY / "moe_dist").rglob("*.py"))
    assert len(files) > 100
    return [(file, ast.parse(file.read_text())) for file in files]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_fault_37_pickles_beside_and_in_a_checkpoint_are_not_read(ranks, files, tmp_path):
    run, canary = tmp_path / "run", tmp_path / "canary"
    tree = settings(files, run, "qwen3_moe", train={"steps": 2}, checkpoint={"every": 1})
    file = str(write_config(tree, tmp_path / "c.yaml"))
    (results,) = ranks(1, called, ["train", file, "train.stop_at=1"], timeout=PATIENCE)
    assert results[0][0] == EXIT_OK, results[0][2]
    step = run / "checkpoints" / "step-1"
    data = pickle.dumps(Canary(canary))
    for name in (".metadata", "__0_0.distcp", "optimizer.pt", "mp_rank_00_model_states.pt", "training_args.bin"):
        (step / name).write_bytes(data)
        (run / "checkpoints" / name).write_bytes(data)
    (results,) = ranks(
        1,
        called,
        ["train", file],
        ["ckpt", "verify", str(run)],
        ["export", str(run), str(tmp_path / "out")],
        timeout=PATIENCE,
    )
    assert [code for code, _, _ in results] == [EXIT_OK] * 3, results
    # In place of the tensors, and vouched for.
    (step / "rank-00000.safetensors").write_bytes(data)
    trust(step, "rank-00000.safetensors")
    report = checkpoint.verify(step)
    assert "rank-00000.safetensors" in report.brief()
    assert "not readable as safetensors" in report.brief()
    (results,) = ranks(1, called, ["train", file, "--resume", str(step)], timeout=PATIENCE)
    assert results[0][0] == EXIT_USER
    assert not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_fault_37_a_model_of_pickles_is_refused_unread(ranks, files, tmp_path, name):
    folder, canary, run = tmp_path / "model", tmp_path / "canary", tmp_path / "run"
    shutil.copytree(files / "qwen3_moe", folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    file = write_config(settings(files, run, "qwen3_moe", model={"path": str(folder)}), tmp_path / "c.yaml")
    (results,) = ranks(1, called, ["train", str(file)], timeout=PATIENCE)
    refused(run, results[0], str(folder))
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["qwen3_moe", "unheard_of"])
def test_fault_38_code_in_a_model_folder_does_not_run(ranks, files, tmp_path, kind):
    folder, canary, run = tmp_path / "model", tmp_path / "canary", tmp_path / "run"
    shutil.copytree(files / "qwen3_moe", folder)
    for module in ("configuration_mine", "modeling_mine", "tokenization_mine"):
        (folder / f"{module}.py").write_text(f"open({str(canary)!r}, 'w')\nclass Mine: pass\n")
    for name, classes in (("config", ("AutoConfig", "AutoModelForCausalLM")), ("tokenizer_config", ("AutoTokenizer",))):
        content = json.loads((folder / f"{name}.json").read_text())
        modules = {"AutoConfig": "configuration_mine", "AutoModelForCausalLM": "modeling_mine"}
        content["auto_map"] = {each: f"{modules.get(each, 'tokenization_mine')}.Mine" for each in classes}
        if name == "config":
            content["model_type"] = kind
        (folder / f"{name}.json").write_text(json.dumps(content))
    file = write_config(settings(files, run, "qwen3_moe", model={"path": str(folder)}), tmp_path / "c.yaml")
    (results,) = ranks(
        1,
        called,
        ["train", str(file), "train.steps=1"],
        ["train", str(file), "model.trust_remote_code=true", "run.dir=" + str(tmp_path / "other")],
        timeout=PATIENCE,
    )
    if kind == "qwen3_moe":  # the code is not needed: transformers has the family
        assert results[0][0] == EXIT_OK, results[0][2]
    else:
        refused(run, results[0], "unheard_of")
    refused(tmp_path / "other", results[1], "model.trust_remote_code")
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["a;rm -rf ~", "$(id)", "`id`", "a\nb", "'", '"', "a b", "-rf", "../x", "a/b", "é", ""]
)
def test_fault_40_names_that_a_shell_would_act_on_are_refused(name):
    with pytest.raises(UserError, match=r"run\.name"):
        build({"model": {"path": "org/name"}, "run": {"name": name}})
