"""`make bench`: every benchmark runs, a failing one stops nothing, and one table holds all results."""

from __future__ import annotations

import json

import pytest

from benchmarks import __main__ as suite

BENCHMARK = """'What it shows.'
from benchmarks._harness import Median, Missed, row, run

def collect(full):
    yield row("a case", Median([1.0, 2.0, 3.0, 4.0, 5.0]), 6.0 if full else 9.0, "some|one")
    {after}

if __name__ == "__main__":
    run("x", collect, description="")
"""
AFTER = {"good": "yield 'a note'", "missing_a_goal": "raise Missed('a goal')", "broken": "raise RuntimeError('broken')"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package with three benchmarks and a module that serves them."""
    package = tmp_path / "fakes"
    package.mkdir()
    for name in ("__init__", "_helper"):
        (package / f"{name}.py").write_text("raise SystemExit(3)\n" if name == "_helper" else "")
    for name, after in AFTER.items():
        (package / f"{name}.py").write_text(BENCHMARK.format(after=after))
    monkeypatch.setenv("PYTHONPATH", str(suite.HERE.parent))
    return package


def test_one_table_of_all_and_a_status_that_tells(folder, tmp_path, capfd):
    to = tmp_path / "results"
    assert suite.main(["--to", str(to)], folder=folder) == 1
    assert capfd.readouterr().out.endswith("summary.md; failed: broken, missing_a_goal\n")
    results = json.loads((to / "summary.json").read_text())
    assert {name: (result["exit_status"], len(result["rows"])) for name, result in results.items()} == {
        "broken": (1, 0),
        "good": (0, 1),
        "missing_a_goal": (1, 1),
    }
    good = results["good"]
    assert good["command"] == "python -m fakes.good"
    assert good["versions"]["torch"]
    assert good["device"]
    assert good["seconds"] > 0
    expected = {"case": "a case", "unit": "ms", "ours": 3.0, "peer": 9.0, "peer_name": "some|one", "ratio": 3.0}
    assert good["rows"] == [expected | {"ours_spread": [2.0, 4.0]}]
    text = (to / "summary.md").read_text()
    assert "| good | a case | ms | 3 (2 to 4) | 9 | 3.00 | some\\|one |" in text
    assert "| broken | What it shows. | `python -m fakes.broken` |" in text


def test_some_by_name_leave_the_others_results(folder, tmp_path):
    assert suite.main(["missing_a_goal", "--to", str(tmp_path)], folder=folder) == 1
    assert suite.main(["good", "--full", "--to", str(tmp_path)], folder=folder) == 0
    results = json.loads((tmp_path / "summary.json").read_text())
    assert sorted(results) == ["good", "missing_a_goal"]
    assert results["good"]["rows"][0]["peer"] == 6.0
    assert results["good"]["command"].endswith("--full")


def test_a_name_that_is_none(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        suite.main(["god", "--to", str(tmp_path)], folder=folder)
    assert end.value.code == 2
    assert "no benchmark is called god; there are broken, good, missing_a_goal" in capsys.readouterr().err


def test_one_that_hangs_ends(folder):
    (folder / "endless.py").write_text("import time\ntime.sleep(60)\n")
    result = suite.measure("fakes.endless", full=False, root=folder.parent, limit=0.5)
    assert result["exit_status"] == "no end after 0.5 s"
    assert result["rows"] == []


def test_rows_of_another_form_are_no_results(folder):
    (folder / "other.py").write_text("import sys\nopen(sys.argv[2], 'w').write('[{\"case\": 1}]')\n")
    result = suite.measure("fakes.other", full=False, root=folder.parent)
    assert result["exit_status"].startswith("a row lacks one of case, ")


def test_the_suite_knows_every_benchmark():
    there = suite.names(suite.HERE)
    assert {"permute", "moe_layer", "hf_experts"} <= set(there)
    assert not [name for name in there if name.startswith("_")]
