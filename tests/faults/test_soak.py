"""A few of the random kills of `make soak`."""

from __future__ import annotations

import pytest

from tests.faults.soak import Soak
from tests.run.runs import make_files

KILLS = 6


@pytest.mark.report_only
@pytest.mark.timeout(600)
def test_fault_01_random_kills_in_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tally = Soak(make_files(tmp_path, "qwen3_moe"), seed=6).run(KILLS)
    print(tally)
    assert tally.kills == KILLS
