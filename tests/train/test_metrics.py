"""Figures are written always; a failing logger never stops a run."""

from __future__ import annotations

import json

import pytest

from moe_dist.train.metrics import MetricLog
from tests.train.test_run_folder import config


def test_lines_are_json_even_for_numbers_that_are_not_finite(tmp_path, capsys):
    log = MetricLog(config(tmp_path), active=True, start_step=0, file=tmp_path / "metrics.jsonl")
    log.write("train", 1, loss=float("nan"), layers={"0": {"load_max": float("inf")}})
    log.say("hello")
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (entry["event"], entry["step"], entry["loss"]) == ("train", 1, "nan")
    assert entry["layers"]["0"]["load_max"] == "inf"
    assert "hello" in capsys.readouterr().out


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = MetricLog(config(tmp_path), active=False, start_step=0, file=tmp_path / "metrics.jsonl")
    log.write("train", 1, loss=1.0)
    log.say("hello")
    log.close()
    assert not (tmp_path / "metrics.jsonl").exists()
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    log = MetricLog(config(tmp_path), active=True, start_step=0, file=tmp_path / "absent" / "metrics.jsonl")
    log.write("train", 1, loss=1.0)
    log.write("train", 2, loss=1.0)
    log.close()
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written") == 1


def test_offline_wandb_keeps_one_id_over_restarts(tmp_path):
    ids = []
    for _ in range(2):
        log = MetricLog(
            config(tmp_path, "logging.wandb=offline"), active=True, start_step=0, file=tmp_path / "metrics.jsonl"
        )
        log.write("train", 1, loss=1.0)
        log.close()
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1]
    assert (tmp_path / "wandb").is_dir()
