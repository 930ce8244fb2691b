"""Who may write into a run folder."""

from __future__ import annotations

import json

import pytest

from moe_dist.config.load import build
from moe_dist.errors import UserError
from moe_dist.train import run_folder


def config(folder, *overrides):
    return build(
        {
            "run": {"dir": str(folder)},
            "model": {"config": {"model_type": "qwen3_moe"}, "tokenizer": "t"},
            "data": {"train": ["a.jsonl"]},
        },
        overrides,
    )


def prepare(configuration, resume="auto", overwrite=False):
    """As the loop does it: ask, then write."""
    root = run_folder.check(configuration, resume=resume, overwrite=overwrite)
    run_folder.write(configuration, overwrite=overwrite, world=1)
    return root


def test_a_new_folder_starts_at_zero_and_the_same_command_resumes(tmp_path):
    folder = tmp_path / "run"
    assert prepare(config(folder)) is None
    assert json.loads((folder / "env.json").read_text())["versions"]["torch"]
    assert prepare(config(folder)) == folder / "checkpoints"


def test_keys_that_change_nothing_learned_may_change(tmp_path):
    prepare(config(tmp_path / "run"))
    assert prepare(config(tmp_path / "run", "parallel.expert=2", "train.log_every=3")) is not None


def test_another_configuration_is_refused_with_the_keys(tmp_path):
    prepare(config(tmp_path / "run"))
    with pytest.raises(UserError, match=r"train\.lr: 0\.0001 -> 0\.5"):
        prepare(config(tmp_path / "run", "train.lr=0.5"))


def test_overwrite_starts_anew(tmp_path):
    folder = tmp_path / "run"
    prepare(config(folder))
    (folder / "checkpoints" / "step-3").mkdir(parents=True)
    assert prepare(config(folder, "train.lr=0.5"), overwrite=True) is None
    assert not (folder / "checkpoints").exists()


def test_never_wants_an_unused_folder(tmp_path):
    prepare(config(tmp_path / "run"), resume="never")
    with pytest.raises(UserError, match="already holds a run"):
        prepare(config(tmp_path / "run"), resume="never")


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no run of ours"):
            prepare(config(tmp_path), overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_what_a_launcher_left_before_the_first_start_is_no_foreign_run(tmp_path):
    (tmp_path / "run/launch").mkdir(parents=True)
    (tmp_path / "run/launch/slurm.sbatch").touch()
    (tmp_path / "run/logs/attempt-1").mkdir(parents=True)  # of a start that failed before it wrote anything else
    assert prepare(config(tmp_path / "run")) is None
    assert prepare(config(tmp_path / "run"), overwrite=True) is None
    assert (tmp_path / "run/launch/slurm.sbatch").exists()


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    run_folder.cut_metrics(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_an_ended_run_evaluates_anew(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"event": "eval", "step": 2}, {"event": "train", "step": 4}, {"event": "eval", "step": 4}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_folder.cut_metrics(file, 4, ended=True)
    assert [json.loads(line) for line in file.read_text().splitlines()] == lines[:2]


def test_asking_writes_nothing(tmp_path):
    folder = tmp_path / "run"
    assert run_folder.check(config(folder), resume="auto", overwrite=False) is None
    assert not folder.exists()
    prepare(config(folder))
    (folder / "checkpoints" / "step-3").mkdir(parents=True)
    assert run_folder.check(config(folder), resume="auto", overwrite=True) is None
    assert (folder / "checkpoints" / "step-3").exists()
