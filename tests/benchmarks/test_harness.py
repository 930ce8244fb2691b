"""The benchmarks' shared harness, and permute's peers on a small problem."""

import json
import time

import pytest
import torch

from benchmarks import _harness, permute


def test_functions_take_turns_and_give_medians():
    calls = []

    def pause(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    quick, slow = _harness.interleaved([lambda: pause("a", 0), lambda: pause("b", 0.005)], rounds=4)
    assert calls == ["a", "b"] + ["a", "b", "b", "a"] * 2  # one call each to warm up
    assert quick < slow
    assert slow >= 5


def test_rows_are_printed_and_written(tmp_path, capsys):
    file = tmp_path / "rows.json"
    _harness.run(
        "permute",
        lambda full: ["A note.", _harness.row("a case", 2.0, 5.0 if full else 3.0, "someone")],
        description="",
        arguments=["--json", str(file), "--full"],
    )
    assert json.loads(file.read_text()) == [
        {"case": "a case", "unit": "ms", "ours": 2.0, "peer": 5.0, "peer_name": "someone", "ratio": 2.5}
    ]
    assert "| a case | ms | 2 | 5 | 2.50 | someone |\n\nA note.\n" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_peer_of_permute_computes_what_we_compute(dtype):
    """Each comparison raises where a peer's result differs."""
    problem = permute.draw((64, 8, 2, 48), dtype)
    rows = [
        permute.measure_row_map(problem, "small", 1),
        *permute.measure_passes(problem, "small", 1, each=True),
        *permute.measure_recipes(problem, "small", 1),
    ]
    assert [row["case"].removeprefix("small ") for row in rows] == [
        "row map",
        "permute",
        "unpermute",
        "permute backward",
        "unpermute backward",
        "forward+backward",
        "bytes moved, forward+backward",
        "step with autograd",
        "step with autograd",
    ]
    assert all(row["ratio"] > 0 for row in rows)


def test_every_peer_with_a_cast_computes_what_we_compute():
    rows = permute.measure_casts(permute.draw((64, 8, 2, 48), torch.float32), "small", 1)
    assert [row["case"] for row in rows] == ["small permute with a cast", "small unpermute with a cast"]
