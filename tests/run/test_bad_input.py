"""What is wrong with the input is one clear message and exit code 2, and nothing is left half written."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moe_dist import checkpoint
from moe_dist.cli.main import main
from moe_dist.errors import EXIT_OK, EXIT_USER, UserError
from tests.models.tiny import make_folder
from tests.run.processes import environment, write_config
from tests.run.runs import VOCAB, assert_same_bits, make_files, settings, stored, train

PATIENCE = 300

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts, tokenizer, and a model in several shards, with variants that are damaged in one way each."""
    folder = make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")
    whole = folder / "qwen3_moe"
    make_folder("qwen3_moe", whole, vocab_size=VOCAB, shard="40KB")
    (whole / "model.safetensors").unlink()
    return folder


def damaged(files: Path, name: str) -> tuple[Path, list[Path]]:
    """A copy of the model to be damaged, and its shards."""
    folder = files / name
    shutil.copytree(files / "qwen3_moe", folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    return folder, shards


def called(*calls: list[str]) -> list[tuple[int, str, str]]:
    """On a rank: (exit code, stdout, stderr) of command lines, one after the other."""
    results = []
    for words in calls:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(words)
            except BaseException:  # what a shell would see as a traceback
                code = -1
                traceback.print_exc()
        results.append((code, out.getvalue(), err.getvalue()))
    return results


def refused(run: Path, result: tuple[int, str, str], *said: str) -> None:
    """One message that says these things, and no run folder."""
    code, _, err = result
    assert code == EXIT_USER, err
    assert "Traceback" not in err
    assert err.count("moe-dist: error: ") == 1, err
    for words in said:
        assert words in err
    assert not run.exists()


def everything_in(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every file."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_damaged_models(ranks, files, tmp_path):
    run = tmp_path / "run"
    missing, shards = damaged(files, "missing")
    shards[1].unlink()
    truncated, cut = damaged(files, "truncated")
    cut[2].write_bytes(cut[2].read_bytes()[:-7])
    header, torn = damaged(files, "header")
    torn[0].write_bytes(torn[0].read_bytes()[:100])
    wrong, _ = damaged(files, "wrong")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    file = wrong / json.loads((wrong / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    lacking, _ = damaged(files, "lacking")
    index = json.loads((lacking / "model.safetensors.index.json").read_text())
    held = lacking / index["weight_map"].pop(name)
    tensors = load_file(held)
    del tensors[name]
    save_file(tensors, held, metadata={"format": "pt"})
    (lacking / "model.safetensors.index.json").write_text(json.dumps(index))
    config, _ = damaged(files, "config")
    (config / "config.json").write_text('{"model_type": "qwen3_moe",')

    folders = (missing, truncated, header, wrong, lacking, config)
    said = (
        ("names the shard model-00002-of-", "which is not there"),
        ("model-00003-of-", "is truncated: it has"),
        ("model-00001-of-", "is truncated or damaged"),
        (f"{name} is [32, 23], expected [32, 24]",),
        ("model.layers.0.mlp.experts.down_proj needs 7 experts, and expert 3 is missing",),
        ("config.json is not a JSON object",),
    )
    calls = []
    for folder in folders:
        file = write_config(settings(files, run, folder.name), tmp_path / f"{folder.name}.yaml")
        calls.append(["train", str(file)])
    (results,) = ranks(1, called, *calls, timeout=PATIENCE)
    for result, words in zip(results, said, strict=True):
        refused(run, result, *words)
    # On several ranks all say the same and none waits for another.
    messages = ranks(2, error_of, settings(files, run, "truncated", parallel={"expert": 2}), timeout=PATIENCE)
    assert messages[0] == messages[1]
    assert "is truncated: it has" in messages[0]
    assert not run.exists()


def error_of(tree: dict) -> str:
    """On each rank: the message of the error that a run ends with."""
    try:
        return f"ended with {train(tree)}"
    except UserError as error:
        return str(error)


def test_wrong_settings_and_data(ranks, files, tmp_path):
    run = tmp_path / "run"
    tree = settings(files, run, "qwen3_moe")
    good = write_config(tree, tmp_path / "good.yaml")
    lines = (files / "text.jsonl").read_text().splitlines(keepends=True)
    corrupt = tmp_path / "corrupt.jsonl"
    corrupt.write_text("".join([*lines[:4], '{"text": "no end\n', *lines[4:]]))
    fieldless = tmp_path / "fieldless.jsonl"
    fieldless.write_text('{"text": "good"}\n{"body": "no text"}\n')
    data = {"seq_len": 24, "cache_dir": str(files / "cache")}
    bad = write_config({**tree, "data": {**data, "train": str(corrupt)}}, tmp_path / "corrupt.yaml")
    none = write_config({**tree, "data": {**data, "train": str(fieldless)}}, tmp_path / "fieldless.yaml")
    bare = make_folder("qwen3_moe", tmp_path / "bare", vocab_size=VOCAB)
    cases = (
        (["train", str(good), f"model.path={bare}"], ("bare holds no tokenizer",)),
        (["train", str(good), "parallel.expert=2"], ("parallel.expert=2 needs at least 2 ranks", "has 1")),
        (["train", str(good), "train.learning_rate=1"], ("unknown key train.learning_rate", "did you mean train.lr?")),
        (["train", str(good), "train.steps=many"], ("train.steps",)),
        (["train", str(bad)], (f"{corrupt}:5",)),
        (["train", str(none)], (f"{fieldless}:2",)),
        (["train", str(good), "train.global_batch_size=3", "train.micro_batch_size=2"], ("train.global_batch_size=3",)),
        (["train", str(good), "trainable.include=[nothing.*]"], ("'nothing.*' matches no parameter",)),
        (["train", str(good), "moe.expert_bias_rate=0.1"], ("moe.expert_bias_rate",)),
        (["train", str(good), "--resume", str(tmp_path / "gone")], ("gone: no such folder",)),
        (["train", str(good), "--resume", str(files)], ("holds no complete checkpoint",)),
    )
    (results,) = ranks(1, called, *(words for words, _ in cases), timeout=PATIENCE)
    for result, (_, said) in zip(results, cases, strict=True):
        refused(run, result, *said)


def test_from_a_shell(files, tmp_path):
    tree = settings(files, tmp_path / "run", "qwen3_moe", parallel={"expert": 4})
    good = write_config(tree, tmp_path / "good.yaml")
    wrong = write_config({**tree, "train": {"stepz": 3}}, tmp_path / "wrong.yaml")
    for file, said in ((good, "parallel.expert=4 needs at least 4 ranks"), (wrong, "did you mean train.steps?")):
        words = [sys.executable, "-m", "moe_dist", "train", str(file)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=PATIENCE)
        assert done.returncode == EXIT_USER
        assert done.stderr.startswith("moe-dist: error: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_go_on_is_left_as_it_was(ranks, files, tmp_path):
    run = tmp_path / "run"
    tree = settings(files, run, "qwen3_moe", train={"steps": 4}, checkpoint={"every": 2})
    file = str(write_config(tree, tmp_path / "c.yaml"))
    half = ["train", file, "train.stop_at=2"]
    (results,) = ranks(1, called, half, timeout=PATIENCE)
    assert results[0][0] == EXIT_OK, results[0][2]
    before = everything_in(run)

    other = make_folder("qwen3_moe", tmp_path / "other", vocab_size=VOCAB, hidden_size=64)
    text = files / "text.jsonl"
    kept = text.read_text()
    cases = (
        (["train", file, "train.lr=0.5"], "train.lr: 0.01 -> 0.5"),
        (["train", file, f"model.path={other}"], "model.path: "),
        (["train", file, "trainable.experts={0: [1]}"], "trainable.experts"),
        (["train", file, "--resume", "never"], "already holds a run"),
    )
    (results,) = ranks(1, called, *(words for words, _ in cases), timeout=PATIENCE)
    text.write_text(kept + '{"text": "and one more"}\n')
    (more,) = ranks(1, called, ["train", file], timeout=PATIENCE)
    text.write_text(kept)
    step = run / "checkpoints" / "step-2"
    shard = step / next(path.name for path in step.iterdir() if path.suffix == ".safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    (torn,) = ranks(1, called, ["train", file], timeout=PATIENCE)
    shard.write_bytes(whole)
    said = [*(words for _, words in cases), "the training data is not that of the checkpoint", "is whole"]
    for (code, _, err), words in zip([*results, *more, *torn], said, strict=True):
        assert code == EXIT_USER, err
        assert words in err
        assert "Traceback" not in err
    assert everything_in(run) == before

    (results,) = ranks(1, called, ["train", file], timeout=PATIENCE)
    assert results[0][0] == EXIT_OK, results[0][2]
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-2", "step-4"]


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(bytes)`: a folder on a file system of that size."""
    mounted = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system of its own")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(ranks, files, tmp_path, small_disk):
    tree = settings(files, tmp_path / "free", "qwen3_moe", train={"steps": 2}, checkpoint={"every": 1})
    file = str(write_config(tree, tmp_path / "c.yaml"))
    (results,) = ranks(1, called, ["train", file], timeout=PATIENCE)
    assert results[0][0] == EXIT_OK, results[0][2]
    one = sum(path.stat().st_size for path in (tmp_path / "free" / "checkpoints" / "step-1").iterdir())

    disk = small_disk(int(1.5 * one) + 100_000)
    full = ["train", file, f"run.dir={disk / 'run'}"]
    (results,) = ranks(1, called, full, timeout=PATIENCE)
    code, _, err = results[0]
    assert code == EXIT_USER, err
    assert "no space in" in err
    assert "checkpoint step 2 was not saved" in err
    assert "Traceback" not in err
    folder = disk / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-1"]
    assert checkpoint.verify(folder / "step-1").ok

    # With room again, the same command goes on.
    subprocess.run(["mount", "-o", f"remount,size={4 * one + 1_000_000}", str(disk)], check=True)
    (results,) = ranks(1, called, full, timeout=PATIENCE)
    assert results[0][0] == EXIT_OK, results[0][2]
    assert_same_bits(stored(disk / "run", 2), stored(tmp_path / "free", 2))

    none = small_disk(4096)
    (results,) = ranks(1, called, ["train", file, f"run.dir={none / 'run'}"], timeout=PATIENCE)
    assert results[0][0] == EXIT_USER, results[0][2]
    assert "No space left on device" in results[0][2]
    assert everything_in(none) == {}
