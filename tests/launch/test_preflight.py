"""What the preflight finds: in made-up facts, and on real ranks of which one is not like the others."""

from __future__ import annotations

import socket
import time

import pytest
import torch.distributed as dist

from moe_dist.config.load import build
from moe_dist.launch.preflight import Needs, collectives, exchange, facts, judge_room
from moe_dist.launch.preflight.compare import compare
from moe_dist.launch.preflight.facts import differing
from moe_dist.train import ranks as together
from tests.run.runs import make_files, settings

GIB = 2**30
HOST = socket.gethostname()
FACT = {
    "host": "n1", "versions": {"torch": "2.13.0"}, "package": "a" * 64, "config": [], "sees": True,
    "disk": 100 * GIB, "device": "cpu", "free": 8 * GIB, "total": 16 * GIB, "told": 1000.0, "heard": 1000.1,
}  # fmt: skip


def facts_of(*changes: dict) -> list[dict]:
    """Facts of the first ranks with these changes, and of two more without any."""
    return [{**FACT, "host": f"n{rank}", **change} for rank, change in enumerate([*changes, {}, {}])]


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ([{}, {}], None, ""),
        ([{}, {"versions": {"torch": "2.12.0"}}], "wrong", "rank 1 on n1: torch is 2.12.0, on the others 2.13.0"),
        ([{"versions": {"torch": None}}], "wrong", "rank 0 on n0: torch is None, on the others 2.13.0"),
        ([{}, {"package": "b" * 64}], "wrong", "rank 1 on n1: moe_dist's own files are bbbbbbbbbbbb"),
        ([{}, {"config": ["train.lr=1 (rank 0: 2)"]}], "wrong", "rank 1 on n1 has another configuration: train.lr=1"),
        ([{}, {"sees": False}], "failed", "rank 1 on n1 does not see the run folder as rank 0 on n0 does"),
        ([{}, {"told": 1100.0}], "warning", "the clock of n1 (rank 1) is 100 s ahead of rank 0's"),
        ([{}, {"told": 900.0}], "warning", "the clock of n1 (rank 1) is 100 s behind rank 0's"),
        ([{}, {"device": "H100"}], "warning", "rank 1 on n1: the device is H100, on the others cpu"),
    ],
)
def test_facts_that_differ(changes, level, text):
    findings = compare(facts_of(*changes))
    assert [finding.level for finding in findings] == ([] if level is None else [level])
    assert all(finding.text.startswith(text) for finding in findings)


@pytest.mark.parametrize(
    ("changes", "needs", "environ", "level", "text"),
    [
        ([{}], Needs(GIB, GIB), {}, None, ""),
        ([{"free": GIB}], Needs(2 * GIB, 0), {}, "failed", "rank 0 on n0 needs 2.0 GiB before activations; 1.0 GiB of"),
        ([{"total": 8 * GIB}], Needs(9 * GIB, 0), {}, "wrong", "rank 0 on n0 needs 9.0 GiB"),
        ([{"disk": GIB}], Needs(0, GIB), {}, "warning", "1.0 GiB free in the run folder; a checkpoint takes about 1.0"),
        ([{"disk": GIB}], Needs(0, 2 * GIB), {}, "wrong", "1.0 GiB free in the run folder"),
        ([{}], Needs(0, GIB), {"MOE_DIST_SIGNAL_LEAD": "1"}, "warning", "the signal to stop comes 1 s before the end"),
        ([{}], Needs(0, GIB), {"MOE_DIST_SIGNAL_LEAD": "60"}, None, ""),
        ([{}], Needs(0, 0), {"SLURM_JOB_END_TIME": "1000"}, "warning", "0 s are left of this job"),
        ([{}], Needs(0, 0), {"SLURM_JOB_END_TIME": str(time.time() + 1e4)}, None, ""),
    ],
)
def test_room(changes, needs, environ, level, text):
    facts_here = facts_of(*changes)
    if level in ("failed", "wrong") and needs.rank:
        facts_here = facts_here[:1]
    findings = judge_room(facts_here, needs, speed=GIB / 30, environ=environ)
    assert [finding.level for finding in findings] == ([] if level is None else [level])
    assert all(finding.text.startswith(text) for finding in findings)


def test_ranks_of_a_host_share_its_memory():
    shared = [{**FACT, "host": "n1"}] * 3
    (finding,) = judge_room(shared, Needs(3 * GIB, 0), speed=1.0, environ={})
    assert finding.text.startswith("ranks 0, 1, 2 on n1 need 9.0 GiB")
    on_gpus = [{**fact, "device": "H100"} for fact in shared]
    assert judge_room(on_gpus, Needs(3 * GIB, 0), speed=1.0, environ={}) == []


def test_differing_keys():
    theirs, ours = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differing(theirs, ours) == ["a.c=4 (rank 0: 2)", "d=None (rank 0: 3)", "e=5 (rank 0: None)"]
    assert differing(ours, ours) == []


# On real ranks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")


def attempt(tree: dict, fault: str | None) -> tuple[str, str, float]:
    """On each rank: what the preflight raises where the last rank has this fault, its text, and the seconds."""
    patched = []

    def patch(owner, name, value):
        patched.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    if dist.get_rank() == dist.get_world_size() - 1:
        if fault == "package":
            patch(facts, "package_hash", lambda: "f" * 64)
        elif fault == "versions":
            patch(together.run_folder, "versions", lambda: {"torch": "1.0"})
        elif fault == "config":
            tree = {**tree, "train": {**tree["train"], "lr": 0.5}}
        elif fault == "folder":
            patch(facts, "VISIBLE", 0.2)
            patch(exchange, "own_facts", lambda *a, **k: {**facts.own_facts(*a, **k), "sees": False})
        elif fault == "all-to-all":
            real = collectives.exchange
            patch(collectives, "exchange", lambda *a, **k: real(*a, **k) + 1)
        elif fault == "product":
            patch(collectives, "_product", lambda device: False)
    start = time.perf_counter()
    try:
        together.preflight(build(tree))
        result = ("", "")
    except Exception as error:
        result = (type(error).__name__, str(error))
    for owner, name, value in reversed(patched):
        setattr(owner, name, value)
    return *result, time.perf_counter() - start


@pytest.mark.parametrize(
    ("fault", "raised", "text"),
    [
        ("package", "UserError", f"rank 1 on {HOST}: moe_dist's own files are ffffffffffff"),
        ("versions", "UserError", f"rank 1 on {HOST}: torch is 1.0, on the others 2."),
        ("config", "UserError", f"rank 1 on {HOST} has another configuration: train.lr=0.5 (rank 0: 0.01)"),
        ("folder", "HostFailure", f"rank 1 on {HOST} does not see the run folder"),
        ("all-to-all", "HostFailure", f"rank 1 on {HOST}: an all-to-all over all ranks gives wrong rows"),
        ("product", "HostFailure", f"rank 1 on {HOST}: a product of matrices on cpu is wrong; leave this host out"),
    ],
)
def test_a_rank_unlike_the_others_is_named_on_all(ranks, files, tmp_path, fault, raised, text):
    tree = settings(files, tmp_path / "run", "qwen3_moe", parallel={"expert": 2})
    for name, message, seconds in ranks(2, attempt, tree, fault):
        assert name == raised
        assert message.startswith("preflight: ")
        assert text in message
        assert seconds < 60
    assert not (tmp_path / "run").exists()


def test_healthy_ranks_take_seconds(ranks, files, tmp_path):
    tree = settings(files, tmp_path / "run", "qwen3_moe", parallel={"expert": 2})
    ranks(2, attempt, tree, None)
    results = ranks(2, attempt, tree, None)
    assert [result[:2] for result in results] == [("", "")] * 2
    assert max(seconds for *_, seconds in results) < 10  # on a machine at rest it is below one
    assert not (tmp_path / "run").exists()


def test_four_ranks_with_two_expert_groups(ranks, files, tmp_path):
    tree = settings(files, tmp_path / "run", "qwen3_moe", parallel={"expert": 2})
    assert [result[:2] for result in ranks(4, attempt, tree, None)] == [("", "")] * 4
    for name, message, _ in ranks(4, attempt, tree, "config"):
        assert name == "UserError"
        assert f"rank 3 on {HOST} has another configuration" in message
