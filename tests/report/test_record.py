"""Reading metrics.jsonl: what is not as a run writes it is left out, and said."""

from __future__ import annotations

import json
import math

from moe_dist.report.record import by_layer, number, read_run
from moe_dist.report.routing import relative_load, whole_run, windows
from moe_dist.report.tables import Table, shown, state


def read(folder, *entries):
    folder.mkdir(exist_ok=True)
    texts = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metrics.jsonl").write_text("".join(text + "\n" for text in texts))
    return read_run(folder)


def train(step, **values):
    return {"event": "train", "step": step, "time": 1.0, **values}


def test_series_take_numbers_alone_and_the_later_line(tmp_path):
    record = read(
        tmp_path, train(3, loss=1.0), train(1, loss=2), train(3, loss=0.5), train(4, loss=None), train(5, loss=[1]),
        train(6, loss="nan"), train(7, loss="-inf"), train(8, loss=True), train(9), train(10, loss=10**30),
    )  # fmt: skip
    series = record.series("train", "loss")
    assert list(series) == [1, 3, 6, 7]
    assert (series[1], series[3], series[7]) == (2, 0.5, -math.inf)
    assert math.isnan(series[6])
    assert any("not a finite number in 2 line(s), first at step 6" in note for note in record.notes)


def test_lines_that_are_none_are_counted(tmp_path):
    record = read(tmp_path, train(1), "", "[]", '{"step": 1}', '{"event": "train", "step": "1"}', '{"event": "tra')
    assert len(record.events["train"]) == 1
    assert any("4 of its lines cannot be read and are left out (line 3, 4, 5, 6)" in note for note in record.notes)


def test_only_the_last_line_keeps_its_layers(tmp_path):
    record = read(tmp_path, train(1, layers={"0": {}}), train(2, layers={"0": {"load_max": 2}}))
    assert "layers" not in record.events["train"][0]
    assert record.last("train")["layers"] == {"0": {"load_max": 2}}


def test_windows_and_their_sum(tmp_path):
    def counted(step, **layers):
        return {"event": "experts", "step": step, "steps": 2, "counts": {name[1:]: c for name, c in layers.items()}}

    record = read(
        tmp_path,
        counted(2, l10=[1, 3], l2=[0, 4]),
        counted(4, l10=[3, 1], l2=[0, 0]),
        counted(6, l10="x", l2=[1, -1]),
        {"event": "experts", "step": 8},
    )
    assert [(window.last, window.span, window.counts) for window in windows(record)] == [
        (2, "steps 1 to 2", {"2": [0, 4], "10": [1, 3]}),
        (4, "steps 3 to 4", {"10": [3, 1]}),
    ]
    assert whole_run(record) == {"2": [0, 4], "10": [4, 4]}
    assert relative_load([1, 3]) == [0.5, 1.5]


def test_how_far_a_run_is(tmp_path):
    record = read(tmp_path, train(3))
    assert state(record) == "The last line is of step 3."
    for settings, words in (
        ({"steps": 3}, "Finished: 3 of 3 steps."),
        ({"steps": 9}, "Not finished: 3 of 9 steps."),
        ({"steps": 9, "stop_at": 3}, "Ended at step 3 as train.stop_at says"),
    ):
        record.config = {"train": settings}
        assert words in state(record)


def test_tables_and_values_for_people():
    table = Table("t", "Title", ("name", "value"), [("a", 12345), ("bcd", None)])
    assert table.text() == "Title\n  name   value\n  a     12,345\n  bcd        -"
    assert [shown(value) for value in (0.123456, 12345.6, 7, "x", None)] == ["0.1235", "12,346", "7", "x", "-"]
    assert by_layer(["10", "outside layers", "9"]) == ["9", "10", "outside layers"]
    assert [number(value) for value in (True, "1", 10**30, 3)] == [None, None, None, 3]
