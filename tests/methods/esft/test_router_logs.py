"""Reading router logs."""

from __future__ import annotations

import numpy as np
import pytest

from moe_dist.errors import UserError
from moe_dist.methods.esft.router_logs import find_router_logs, read_router_log
from tests.methods.esft import published


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
