"""Placement by the scores of a task: the goals on real routing, and the bound that they are measured against."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest

from benchmarks import esft_placement
from tests.methods.esft import published


@published.needed
def test_the_goals_on_real_routing(tmp_path):
    assert esft_placement.main(["--data", str(published.FOLDER), "--json", str(tmp_path / "rows.json")]) == 0
    rows = {row["case"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    contiguous = [round(rows[f"load EP={size}"]["peer"], 2) for size in (2, 4, 8, 16)]
    assert contiguous == [1.09, 1.25, 1.44, 1.80]


def test_without_the_routing_nothing_is_measured(tmp_path, capsys):
    assert esft_placement.main(["--data", str(tmp_path), "--json", str(tmp_path / "rows.json")]) == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == []
    assert "skipped" in capsys.readouterr().err


def test_no_placement_beats_the_bound():
    chance = random.Random(4)
    for _ in range(20):
        load_E = np.array([chance.choice([0.0, 1.0, 2.0, 9.0 * chance.random()]) for _ in range(6)]) + 0.01
        best = min(
            max(load_E[list(order[:2])].sum(), load_E[list(order[2:4])].sum(), load_E[list(order[4:])].sum())
            for order in itertools.permutations(range(6))
        )
        assert best * 3 / load_E.sum() >= esft_placement.lower_bound(load_E, 3) - 1e-12
    assert esft_placement.lower_bound(np.array([9.0, 1.0, 2.0, 3.0]), 2) == pytest.approx(20 / 15)
