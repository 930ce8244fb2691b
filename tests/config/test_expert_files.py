"""Scores and expert configs as files: what is written, what is read back, and what is refused."""

from __future__ import annotations

import json

import pytest

from moe_dist.config.expert_files import (
    ExpertConfig,
    Summary,
    read_expert_config,
    read_summary,
    write_expert_config,
    write_summary,
)
from moe_dist.errors import UserError


def test_a_summary_is_rounded_and_read_back(tmp_path):
    scores = {"token": {"1": [0.25, 0.7500499], "10": [1.0, 0.0]}, "gate": {"1": [1 / 3, 0.0], "10": [0.5, 0.5]}}
    write_summary(tmp_path / "new" / "summary.json", Summary(scores, {"tokens": 12}))
    tree = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert tree["token_scores"] == {"1": {"0": 0.25, "1": 0.75}, "10": {"0": 1.0, "1": 0.0}}
    assert tree["gate_scores"]["1"] == {"0": 0.3333, "1": 0.0}
    read = read_summary(tmp_path / "new" / "summary.json")
    assert read.scores["token"]["1"] == [0.25, 0.75]
    assert read.extra == {"tokens": 12}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["summary.json"]


def test_an_expert_config_is_the_official_one(tmp_path):
    write_expert_config(tmp_path / "c.json", ExpertConfig({"1": [8, 2], "2": []}, shared_experts=True))
    assert json.loads((tmp_path / "c.json").read_text()) == {
        "experts": {"1": [8, 2], "2": []},
        "shared_experts": True,
        "non_expert_modules": False,
    }
    assert read_expert_config(tmp_path / "c.json") == ExpertConfig({"1": [8, 2], "2": []}, True, False)


def test_layers_come_in_order_of_depth(tmp_path):
    (tmp_path / "c.json").write_text('{"experts": {"10": [1], "9": [2], "1": [3]}}')
    assert list(read_expert_config(tmp_path / "c.json").experts) == ["1", "9", "10"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_summary(path, Summary({"token": {"1": [float("nan")]}}))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no valid JSON"),
        ("[]", "has to be an object"),
        ("{}", "no scores; expected"),
        ('{"token_scores": {}}', "no scores"),
        ('{"token_scores": 3}', "token_scores: 3 has to be an object"),
        ('{"token_scores": {"one": {"0": 1}}}', "'one' has to be the index of a layer"),
        ('{"token_scores": {"1": {"0": 1, "2": 0}}}', r"layer 1: no score of expert\(s\) \[1\]"),
        ('{"token_scores": {"1": {"0": 1, "0": 0}}}', "'0' stands twice"),
        ('{"token_scores": {"1": {"0": NaN}}}', "NaN is no number"),
        ('{"token_scores": {"1": {"0": "0.1"}}}', "layer 1, expert 0"),
        ('{"gate_scores": {"1": {"0": -0.1}}}', "at least 0"),
    ],
)
def test_damaged_scores_are_refused(tmp_path, text, message):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_summary(tmp_path / "s.json")
    assert "s.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"token_scores": {"1": {"0": 1}}}', 'no "experts"'),
        ('{"experts": {"1": 3}}', "has to be a list"),
        ('{"experts": {"1": [true]}}', "has to be a list"),
        ('{"experts": {"1": [3, 3]}}', r"\[3\] named more than once"),
        ('{"experts": {"-1": [3]}}', "index of a layer"),
        ('{"experts": {"1": [3]}, "shared_experts": "yes"}', "has to be true or false"),
    ],
)
def test_damaged_expert_configs_are_refused(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_expert_config(tmp_path / "c.json")


def test_scores_of_a_kind_that_is_absent(tmp_path):
    (tmp_path / "s.json").write_text('{"gate_scores": {"1": {"0": 0.1}}}')
    with pytest.raises(UserError, match=r"x: no token_scores; there is gate_scores"):
        read_summary(tmp_path / "s.json").of_kind("token", where="x")
    with pytest.raises(UserError, match="no such file"):
        read_summary(tmp_path / "nothing.json")
