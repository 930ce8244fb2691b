"""The GPU suite in its CPU mode: every part runs, time that is short drops the largest cases, a GPU's results stay."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import _gpu_checks, gpu_suite
from benchmarks._gpu_cases import Case, cases
from benchmarks._gpu_clock import Clock, Deadline

CASE = Case("tiny", 24, 4, 2, 32, 16)
COPY, PRODUCTS = "copy of as many bytes", "its bare grouped products"


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Run it -> (exit status, what gpu_suite.json holds)."""
    if torch.cuda.is_available():
        pytest.skip("this is the CPU mode")
    monkeypatch.setattr(_gpu_checks, "gpu_tests", lambda seconds: "not here")
    monkeypatch.setattr(gpu_suite, "cases", lambda device: [CASE])

    def run(*arguments: str):
        status = gpu_suite.main(["--to", str(tmp_path), *arguments])
        return status, json.loads((tmp_path / "gpu_suite.json").read_text())

    return run


def test_every_part_runs(suite, tmp_path):
    status, results = suite("--json", str(tmp_path / "rows.json"))
    assert status == 0
    peers = [row["peer_name"] for row in results["rows"]]
    assert peers.count(COPY) == 6
    for name in (PRODUCTS, "torchtitan's recipe", "Megatron-Core's recipe", "torch index_select"):
        assert peers.count(name) == 1, results["notes"]
    for name in ("eager", "grouped_mm", "batched_mm"):
        assert f"transformers {name}" in peers, results["notes"]
    assert "ours, back end loop" in peers
    assert json.loads((tmp_path / "rows.json").read_text()) == results["rows"]
    table = (tmp_path / "gpu_suite.md").read_text()
    assert "CPU mode" in table
    assert table.count("| tiny T24 ") == len(peers)
    assert len(results["goals"]) == 4


def test_what_would_not_be_done_in_time_is_left_out_and_named():
    small, large = CASE, Case("large", 24, 4, 2, 32, 1600)
    results = {"rows": [], "notes": []}

    def sleepers_of(case, clock, seconds):
        time.sleep(0.05)
        yield {"case": str(case), "unit": "ms", "ours": 1.0, "peer": 1.0, "ratio": 1.0, "peer_name": "nobody"}

    lines = gpu_suite.measured(sleepers_of, [small, large, small], Deadline(1.0), results, Clock(torch.device("cpu")))
    assert len(list(lines)) == 3
    assert [row["case"] for row in results["rows"]] == ["tiny T24", "tiny T24"]
    assert results["notes"] == ["No time was left for sleepers at large T24."]


def test_the_largest_cases_come_last():
    for device in ("cpu", "cuda"):
        tokens = [case.tokens for case in cases(torch.device(device))]
        assert tokens == sorted(tokens)


def test_results_of_a_gpu_stay(suite, tmp_path):
    (tmp_path / "gpu_suite.json").write_text('{"mode": "gpu"}')
    assert suite() == (0, {"mode": "gpu"})
    assert not (tmp_path / "gpu_suite.md").exists()
