"""Overlap of training data with held-out items, and items that are badly written."""

from __future__ import annotations

import json

import pytest

from moe_dist.errors import PolicyStop, UserError
from moe_dist.methods.self_moe.evaluation.items import Item, read_items, read_texts
from moe_dist.methods.self_moe.judging.contamination import Contamination, overlaps_of, refuse_above

WORDS = [*"abcdefghijklmno"]


def write(path, *records) -> str:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return str(path)


def chat(question: str, answer: str) -> dict:
    return {"id": "1", "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_seeds_items_and_chats_are_compared(tmp_path):
    seeds = write(tmp_path / "seeds.jsonl", {"instruction": "Sort these words.", "input": "b a", "output": "a b"})
    train = write(
        tmp_path / "train.jsonl", chat("Say something.", " ".join(WORDS)), chat("Why is the sky blue?", "air")
    )
    known = Contamination.of_files([seeds, train])
    assert known.find("sort these words\nb a") == f"{seeds}:1"
    assert known.find("Sort those names, please. b a") is None
    assert known.find("Go on:", "so " + " ".join(WORDS[2:15]) + " end") == f"{train}:1"
    assert known.find("Go on:", "so " + " ".join(WORDS[2:14]) + " end") is None  # twelve words are too few
    held = write(
        tmp_path / "held.jsonl",
        {"instruction": "Why is the sky blue?", "output": "x"},
        {"instruction": "Q", "test": "pass"},
    )
    report = overlaps_of("skill", read_texts(held), known)
    assert (report.found, report.total, report.share) == (1, 2, 0.5)
    assert report.render() == f"skill: 1 of 2 items overlap (50.0%)\n  {held}:1 with {train}:2"
    refuse_above([report], 0.5)
    with pytest.raises(PolicyStop, match=r"max_contamination=0.4:\nskill: 1 of 2"):
        refuse_above([report], 0.4)


def test_items(tmp_path):
    path = write(
        tmp_path / "held.jsonl",
        {"instruction": " Add. ", "input": "3 4", "output": 7},
        {"id": "b", "instruction": "Pick.\n", "output": ["x", "y"]},
        {"instruction": "Write f.", "test": "assert f() == 1"},
    )
    assert read_items(path) == [
        Item("1", "Add.\n3 4", ("7",), None, f"{path}:1"),
        Item("b", "Pick.\n", ("x", "y"), None, f"{path}:2"),
        Item("3", "Write f.", (), "assert f() == 1", f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"output": "x"}, r"held.jsonl:1: no text under 'instruction' \(fields here: output\)"),
        ({"instruction": "x"}, "neither 'output' nor 'test'"),
        ({"instruction": "x", "output": {}}, "'output' has to be a string or a list"),
        ({"instruction": "x", "test": 3}, "'test' has to be the text of a program"),
        ([1], "an item has to be an object, not list"),
    ],
)
def test_bad_items(tmp_path, record, message):
    path = write(tmp_path / "held.jsonl", record)
    with pytest.raises(UserError, match=message):
        read_items(path)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="cannot be opened"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no items"):
        read_items(tmp_path / "empty.jsonl")
    twice = write(tmp_path / "twice.jsonl", *[{"id": 1, "instruction": "x", "output": "y"}] * 2)
    with pytest.raises(UserError, match=r"twice.jsonl:2: the same id '1' as in .*twice.jsonl:1"):
        read_items(twice)
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"broken.jsonl:1: not valid JSON"):
        read_items(tmp_path / "broken.jsonl")
