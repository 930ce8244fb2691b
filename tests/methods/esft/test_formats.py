"""Reading and writing the files of the ESFT repository."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe_dist.errors import UserError
from moe_dist.methods.esft.formats import (
    ExpertConfig,
    Summary,
    find_router_logs,
    read_expert_config,
    read_router_log,
    read_summary,
    write_expert_config,
    write_summary,
)
from tests.methods.esft import published


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


def test_router_logs(tmp_path):
    for rank, line in enumerate(["3\t1\t0\t2\t\t0.5\t0.25\t0.3\t0.1\n", "1\t0\t\t0.9\t0.0004\n"]):
        (tmp_path / f"rank_{rank}").mkdir()
        (tmp_path / f"rank_{rank}" / "expert_weights_4.txt").write_text(line)
    logs = find_router_logs(tmp_path)
    assert [path.parent.name for path in logs["4"]] == ["rank_0", "rank_1"]
    ((ids, weights),) = read_router_log(logs["4"][0], top_k=2).passes
    assert ids.tolist() == [[3, 1], [0, 2]]
    assert weights.tolist() == [[0.5, 0.25], [0.3, 0.1]]


@published.needed
def test_a_published_log_is_the_routing():
    ids, weights, lengths = published.routing()
    log = read_router_log(published.FOLDER / "intent_expert_weights_1.txt", top_k=6)
    assert [len(pair[0]) for pair in log.passes] == lengths.tolist()
    assert np.array_equal(np.concatenate([pair[0] for pair in log.passes]), ids[0])
    assert np.abs(np.concatenate([pair[1] for pair in log.passes]) - weights[0]).max() < 1e-12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("1\t2\n", "log.txt:1: no empty field"),
        ("1\t2\t\t0.5\t0.5\n1\t2\t\t0.5\n", "log.txt:2: 2 ids but 1 weights"),
        ("1\t2\t3\t\t0.5\t0.5\t0.5\n", "no whole number of tokens at 2 experts"),
        ("1\tx\t\t0.5\t0.5\n", "log.txt:1"),
        ("1\t-2\t\t0.5\t0.5\n", "below zero"),
        ("1\t2\t\t0.5\tnan\n", "no finite number"),
    ],
)
def test_damaged_logs_are_refused(tmp_path, text, message):
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_router_log(tmp_path / "log.txt", top_k=2)


def test_a_folder_without_logs(tmp_path):
    with pytest.raises(UserError, match="no router logs there"):
        find_router_logs(tmp_path)
