"""A configuration that changes while a run is under way."""

from __future__ import annotations

import pytest

from moe_dist.errors import EXIT_OK, EXIT_USER
from tests.run.processes import write_config
from tests.run.runs import events, make_files, settings
from tests.run.test_bad_input import called

PATIENCE = 240


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")


def test_fault_13_what_may_differ_is_said_key_by_key(ranks, files, tmp_path):
    run = tmp_path / "run"
    tree = settings(files, run, "qwen3_moe", train={"steps": 4, "schedule": "constant"})
    file = str(write_config(tree, tmp_path / "c.yaml"))
    other = ["train", file, "train.lr=0.5", "train.betas=[0.8,0.9]"]
    allowed = [*other, "--allow-config-drift", "train.lr", "--allow-config-drift", "train.betas"]
    calls = (
        ["train", file, "train.stop_at=2"],
        other,
        [*other, "--allow-config-drift", "train.lr"],
        [*other, "--allow-config-drift", "train.learning"],
        allowed,
        allowed,  # and the same command again
        ["train", file],
    )
    (results,) = ranks(1, called, *calls, timeout=PATIENCE)
    codes, said = [code for code, _, _ in results], [err for _, _, err in results]
    assert codes == [EXIT_OK, EXIT_USER, EXIT_USER, EXIT_USER, EXIT_OK, EXIT_OK, EXIT_USER], said
    assert "train.lr: 0.01 -> 0.5" in said[1]
    assert "train.betas.0: 0.9 -> 0.8" in said[1]
    assert "train.lr" not in said[2].split("\n  ")[1]
    assert "train.betas.0: 0.9 -> 0.8" in said[2]
    assert "train.learning: no such key" in said[3]
    assert [line["lr"] for line in events(run, "train")] == [0.005, 0.01, 0.5, 0.5]  # the first step warms up
    assert "train.lr: 0.5 -> 0.01" in said[6]  # it is another run's configuration now
