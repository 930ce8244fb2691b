"""`moe-dist inspect`: the numbers beside each figure are the run's, and every kind of folder has its words."""

from __future__ import annotations

import csv
import json

import pytest

from moe_dist.cli.main import main
from moe_dist.errors import EXIT_OK, EXIT_USER
from tests.report.conftest import STEPS, lines

pytest.importorskip("matplotlib")


def table(run, name: str) -> list[list[str]]:
    with open(run / "plots" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def column(run, name: str, label: str) -> dict[int, float]:
    header, *rows = table(run, name)
    at = header.index(label)
    return {int(row[0]): float(row[at]) for row in rows if row[at]}


def of_metrics(run, event: str, *keys: str) -> dict[int, float]:
    found = {}
    for line in lines(run):
        if line["event"] == event:
            value = line
            for key in keys:
                value = value[key]
            found[line["step"]] = value
    return found


def test_every_figure_has_the_numbers_of_the_metrics(run, capsys):
    assert main(["inspect", str(run)]) == EXIT_OK
    for name, label, keys in (
        ("loss", "training", ["loss"]),
        ("load", "busiest expert", ["load_max"]),
        ("load", "busiest rank", ["rank_load_max"]),
        ("entropy", "lowest layer", ["load_entropy"]),
        ("dead_experts", "experts", ["dead_experts"]),
        ("dropped", "largest layer", ["dropped"]),
        ("learning_rate", "learning rate", ["lr"]),
        ("gradient_norm", "norm before clipping", ["grad_norm"]),
        ("speed", "tokens a second", ["tokens_per_second"]),
    ):
        assert column(run, name, label) == of_metrics(run, "train", *keys), name
        assert list(column(run, name, label)) == list(range(1, STEPS + 1))
    for domain in ("held", "<b>other"):
        expected = of_metrics(run, "eval", "domains", domain, "loss")
        assert column(run, "loss", f"held-out {domain}") == expected
        assert list(expected) == [2, 4, 5, 6, 8]
    for picture in (run / "plots").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.with_suffix(".csv").is_file()
        assert f"Numbers: {picture.stem}.csv" in (run / "plots" / "index.html").read_text()
    out = capsys.readouterr().out
    assert f"Finished: {STEPS} of {STEPS} steps." in out
    assert "2; went on from step 5" in out
    assert f"open {run / 'plots' / 'index.html'}" in out


def test_counts_of_experts_are_all_the_slots_of_the_run(run):
    counted = [line for line in lines(run) if line["event"] == "experts"]
    assert sum(line["steps"] for line in counted) == STEPS
    tokens = of_metrics(run, "train", "tokens")[STEPS]
    for layer in ("0", "1"):
        total = [sum(counts) for counts in zip(*(line["counts"][layer] for line in counted), strict=True)]
        assert sum(total) == 2 * tokens  # two experts a token
        assert main(["inspect", str(run)]) == EXIT_OK
        row = next(row for row in table(run, "routing") if row[0] == layer)
        assert [float(value) for value in row[1:]] == pytest.approx([4 * count / sum(total) for count in total])
        change = next(row for row in table(run, "routing_change") if row[0] == layer)
        first, last = counted[0]["counts"][layer], counted[-1]["counts"][layer]
        expected = [4 * b / sum(last) - 4 * a / sum(first) for a, b in zip(first, last, strict=True)]
        assert [float(value) for value in change[1:]] == pytest.approx(expected)


def test_what_each_expert_gets_of_each_held_out_domain(run):
    """Shares of the metrics' counts, as a mean over layers: at the end, and at every evaluation."""
    assert main(["inspect", str(run)]) == EXIT_OK
    header, *rows = table(run, "domain_routing")
    assert header == ["domain / expert", "0", "1", "2", "3"]
    files = {"<b>other": "domain_routing_0__b_other", "held": "domain_routing_1_held"}
    assert [row[0] for row in rows] == list(files)
    for row, (domain, file) in zip(rows, files.items(), strict=True):
        counts = of_metrics(run, "eval", "domains", domain, "experts")
        mean = {
            step: [sum(slots[e] / sum(slots) for slots in layers.values()) / len(layers) for e in range(4)]
            for step, layers in counts.items()
        }
        assert [float(value) for value in row[1:]] == pytest.approx(mean[STEPS])
        for expert in range(4):
            shown = column(run, file, f"expert {expert}")
            assert shown == pytest.approx({step: shares[expert] for step, shares in mean.items()})
            assert list(shown) == [2, 4, 5, 6, 8]
        assert f"Numbers: {file}.csv" in (run / "plots" / "index.html").read_text()


def test_many_experts_and_one_evaluation(run):
    whole = lines(run)
    for line in whole:
        if line["event"] == "eval":
            for figures in line["domains"].values():
                figures["experts"] = {layer: [*slots, *[0] * 8] for layer, slots in figures["experts"].items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole))
    assert main(["inspect", str(run)]) == EXIT_OK
    assert table(run, "domain_routing_1_held")[0] == ["step / expert", *map(str, range(12))]
    once = [line for line in whole if line["event"] != "eval" or line["step"] == STEPS]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in once))
    assert main(["inspect", str(run), "--out", str(run / "once")]) == EXIT_OK
    assert (run / "once" / "domain_routing.csv").is_file()
    assert not list((run / "once").glob("domain_routing_*"))


def test_tables(run):
    assert main(["inspect", str(run)]) == EXIT_OK
    rows = table(run, "trainable")[1:]
    assert [row[:3] for row in rows] == [
        ["0", "2", "4"],
        ["1", "1", "4"],
        ["outside layers", "0", "0"],
        ["all", "3", "8"],
    ]
    assert table(run, "experts_per_layer") == [["layer", "experts that train"], ["0", "2"], ["1", "1"]]
    held_out = {row[0]: row[1:] for row in table(run, "held_out")[1:]}
    losses = of_metrics(run, "eval", "domains", "held", "loss")
    best = min(losses, key=losses.get)
    assert [float(v) for v in held_out["held"][:4]] == [losses[2], losses[best], best, losses[STEPS]]
    layers = [line for line in lines(run) if line["event"] == "train"][-1]["layers"]
    assert [float(row[1]) for row in table(run, "layers")[1:]] == [layers[name]["load_max"] for name in ("0", "1")]
    assert [row[0] for row in table(run, "checkpoints")[1:]] == ["step-6", "step-8"]


def test_the_same_run_gives_the_same_files(run, tmp_path):
    for name in ("a", "b"):
        assert main(["inspect", str(run), "--out", str(tmp_path / name)]) == EXIT_OK
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert not (run / "plots").exists()


def test_scores_selection_and_other_tasks(run, tmp_path, capsys):
    scores = {
        "token_scores": {layer: {str(e): 0.25 for e in range(4)} for layer in ("0", "1")},
        "moe_dist": {"top_k": 1},
    }
    other = {"token_scores": {layer: {"0": 0.1, "1": 0.2, "2": 0.3, "3": 0.4} for layer in ("0", "1")}}
    (run / "summary.json").write_text(json.dumps(scores))
    (tmp_path / "law.json").write_text(json.dumps(other))
    select = ["esft", "select", "--scores", str(run / "summary.json"), "--p", "0.5", "--out", str(run / "mine.json")]
    assert main(select) == EXIT_OK
    assert main(["inspect", str(run), "--compare", str(tmp_path / "law.json")]) == EXIT_OK
    assert table(run, "overlap") == [["task / task", "tiny", "law"], ["tiny", "1.0", "0.0"], ["law", "0.0", "1.0"]]
    assert [row[1] for row in table(run, "coverage")[1:]] == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    assert table(run, "selection_mine")[1:] == [["0", "2", "4", "0.5", "1.0"], ["1", "2", "4", "0.5", "1.0"]]
    (tmp_path / "law.json").write_text(json.dumps({"token_scores": {"0": {"0": 1.0}}}))
    assert main(["inspect", str(run), "--compare", str(tmp_path / "law.json")]) == EXIT_USER
    assert "not of the same model" in capsys.readouterr().err


def test_a_run_without_scores_goes_by_its_own_counts(run):
    assert main(["inspect", str(run)]) == EXIT_OK
    header, *rows = table(run, "coverage")
    assert header[1:] == ["layer 0", "layer 1"]
    assert [float(value) for value in rows[-1]] == pytest.approx([4, 1, 1])
    load = sorted(map(float, next(row for row in table(run, "routing") if row[0] == "1")[1:]), reverse=True)
    assert float(rows[1][2]) == pytest.approx(load[0] / 4)


def test_a_killed_run_with_a_torn_line(run, capsys):
    whole = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in whole if json.loads(line)["step"] <= 3]
    (run / "metrics.jsonl").write_text("\n".join([*kept, '"stray"', whole[-1][:40]]))
    (run / "env.json").write_text("{")
    assert main(["inspect", str(run)]) == EXIT_OK
    out = capsys.readouterr().out
    assert f"Not finished: 3 of {STEPS} steps" in out
    assert "2 of its lines cannot be read" in out
    assert "env.json: no valid JSON" in out
    assert list(column(run, "loss", "training")) == [1, 2, 3]
    assert "cannot be read" in (run / "plots" / "index.html").read_text()


def test_losses_that_are_not_finite(run, capsys):
    changed = [
        {**line, "loss": "nan", "grad_norm": "inf"} if line["event"] == "train" and line["step"] == 4 else line
        for line in lines(run)
    ] + [{"event": "skipped", "step": STEPS, "grad_norm": "inf"}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert main(["inspect", str(run)]) == EXIT_OK
    assert "not a finite number in 1 line(s), first at step 4" in capsys.readouterr().out
    assert [row[1] for row in table(run, "loss") if row[0] == "4"] == ["nan"]
    assert table(run, "skipped")[1:] == [[str(STEPS), "inf"]]


def test_before_the_first_step(run, capsys):
    first = [line for line in lines(run) if line["event"] in ("data", "trainable")][:2]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in first))
    assert main(["inspect", str(run)]) == EXIT_OK
    out = capsys.readouterr().out
    for words in (
        "No step has been logged yet.",
        "No line of training",
        "No heat map",
        "No scores",
        "No held-out loss",
    ):
        assert words in out
    assert (run / "plots" / "experts_per_layer.csv").is_file()
    assert not (run / "plots" / "loss.csv").exists()


@pytest.mark.parametrize("kept", ["config.resolved.yaml", "metrics.jsonl"])
def test_one_file_alone(run, tmp_path, capsys, kept):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / kept).write_bytes((run / kept).read_bytes())
    assert main(["inspect", str(bare)]) == EXIT_OK
    missing = "metrics.jsonl" if kept.startswith("config") else "config.resolved.yaml"
    assert f"{missing} is missing" in capsys.readouterr().out
    assert "There is no checkpoint." in (bare / "plots" / "index.html").read_text()


def test_what_is_no_run_is_refused(trained, run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for words, message in (
        ([str(tmp_path / "nowhere")], "nowhere: no such folder"),
        ([str(trained.parent)], f"did you mean {trained}?"),
        ([str(run), "--compare", str(tmp_path / "nowhere.json")], "nowhere.json: no such file"),
        ([str(run), "--out", str(tmp_path / "file")], "cannot be written"),
    ):
        assert main(["inspect", *words]) == EXIT_USER
        assert message in capsys.readouterr().err
    assert not (run / "plots").exists()


def test_without_matplotlib(run, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["inspect", str(run)]) == EXIT_USER
    assert "pip install 'moe_dist[plots]'" in capsys.readouterr().err
    assert not (run / "plots").exists()


def test_a_full_disk_leaves_what_was_there(run, monkeypatch, capsys):
    assert main(["inspect", str(run)]) == EXIT_OK
    before = {path.name: path.read_bytes() for path in (run / "plots").iterdir()}

    def fails(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    (run / "metrics.jsonl").write_text("")
    assert main(["inspect", str(run)]) == EXIT_USER
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (run / "plots").iterdir()} == before
