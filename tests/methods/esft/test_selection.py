"""`moe-dist esft select`: the command, its record, table and figures."""

from __future__ import annotations

import csv
import json

import pytest

from moe_dist.cli.main import main
from moe_dist.errors import EXIT_OK, EXIT_USER, UserError
from moe_dist.methods.esft.selection import choose, coverage_curve, overlap
from tests.methods.esft import published

SCORES = {
    "token_scores": {"2": {"0": 0.1, "1": 0.6, "2": 0.3}, "11": {"0": 0.5, "1": 0.5, "2": 0.0}},
    "gate_scores": {"2": {"0": 0.05, "1": 0.2, "2": 0.15}, "11": {"0": 0.3, "1": 0.1, "2": 0.0}},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(SCORES))
    return tmp_path


def select(*words: str) -> int:
    return main(["esft", "select", "--scores", "summary.json", "--out", "out/config.json", *words])


def written(folder):
    return [json.loads((folder / "out" / name).read_text()) for name in ("config.json", "config.selection.json")]


def test_select_writes_config_and_record(folder, capsys):
    assert select("--kind", "token", "--p", "0.7") == EXIT_OK
    config, record = written(folder)
    assert config == {"experts": {"2": [1, 2], "11": [0, 1]}, "shared_experts": False, "non_expert_modules": False}
    assert (record["p"], record["kind"], record["control"], record["seed"]) == (0.7, "token", "none", None)
    assert record["layers"]["2"] == {"selected": 2, "experts": 3, "covered": 0.9, "mass": 1.0}
    table = capsys.readouterr().out
    assert "    2       2/3   0.9000    90.0%  1 2" in table
    assert "4/6" in table


def test_gate_scores_have_their_own_default_and_a_fraction(folder):
    assert select("--kind", "gate") == EXIT_OK
    assert written(folder)[0]["experts"] == {"2": [1], "11": [0]}
    assert written(folder)[1]["p"] == 0.1
    assert select("--kind", "gate", "--p", "0.8", "--p-mode", "fraction_of_mass", "--shared-experts") == EXIT_OK
    assert written(folder)[0]["experts"] == {"2": [1, 2], "11": [0, 1]}
    assert written(folder)[0]["shared_experts"] is True


def test_controls_record_their_seed(folder):
    assert select("--p", "0.5", "--control", "random", "--seed", "4") == EXIT_OK
    config, record = written(folder)
    assert (record["control"], record["seed"]) == ("random", 4)
    assert config["experts"]["2"][0] != 1
    assert config["experts"]["11"][0] != 0
    assert select("--p", "0.5", "--control", "least_used") == EXIT_OK
    assert written(folder)[0]["experts"] == {"2": [0], "11": [2]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--p", "0"], "p=0.0: has to be above 0"),
        (["--p", "x"], "argument --p"),
        (["--kind", "both"], "argument --kind"),
        (["--compare", "other.json"], "--compare is for --plots"),
        (["--plots", "p", "--compare", "other.json"], "other.json: no such file"),
        (["stray"], "unrecognized arguments"),
    ],
)
def test_wrong_input_exits_2_and_writes_nothing(folder, capsys, words, message):
    assert select(*words) == EXIT_USER
    assert message in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["summary.json"]


def test_the_group_of_verbs(capsys):
    assert main(["esft"]) == EXIT_USER
    assert main(["esft", "selekt"]) == EXIT_USER
    assert "did you mean esft select?" in capsys.readouterr().err
    assert main(["esft", "select", "--help"]) == EXIT_OK
    assert "usage: moe-dist esft select" in capsys.readouterr().out


@published.needed
def test_the_published_files(folder):
    out = folder / "intent.json"
    scores = published.FOLDER / "intent_scores.json"
    words = ["--scores", str(scores), "--kind", "token", "--p", "0.2", "--out", str(out)]
    assert main(["esft", "select", *words]) == EXIT_OK
    assert json.loads(out.read_text()) == json.loads((published.FOLDER / "intent_expert_config.json").read_text())


def test_figures_have_their_numbers_beside_them(folder):
    pytest.importorskip("matplotlib")
    other = {"token_scores": {"2": {"0": 0.6, "1": 0.1, "2": 0.3}, "11": {"0": 0.5, "1": 0.5, "2": 0.0}}}
    (folder / "law").mkdir()
    (folder / "law" / "summary.json").write_text(json.dumps({**other, "moe_dist": {"top_k": 1}}))
    assert select("--p", "0.7", "--plots", "plots", "--compare", "law/summary.json") == EXIT_OK
    for name in ("experts_per_layer", "coverage", "overlap"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    tables = {path.stem: list(csv.reader(path.open())) for path in (folder / "plots").glob("*.csv")}
    assert tables["experts_per_layer"] == [["layer", "experts that train"], ["2", "2"], ["11", "2"]]
    assert [round(float(row[1]), 9) for row in tables["coverage"][1:]] == [0.0, 0.6, 0.9, 1.0]
    assert [row[1:] for row in tables["overlap"][1:]] == [["1.0", "0.5"], ["0.5", "1.0"]]


def test_coverage_and_overlap():
    assert coverage_curve([0.1, 0.3]) == pytest.approx([0.0, 0.75, 1.0])
    assert coverage_curve([0.0, 0.0]) == [0.0, 0.0, 0.0]
    assert overlap({"1": [3, 2, 1]}, {"1": [1, 2, 3]}, top=2) == 1.0
    with pytest.raises(UserError, match="not of the same model"):
        overlap({"1": [3, 2, 1]}, {"1": [1, 2]}, top=2)
    with pytest.raises(UserError, match="no expert was used"):
        choose({"1": [0.0, 0.0]})
