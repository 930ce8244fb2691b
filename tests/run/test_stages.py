"""A whole run in pipeline stages takes the course of one process, and goes on where it was stopped."""

from __future__ import annotations

import pytest

from tests.reference import relative_error
from tests.run.runs import events, make_files, settings, stored, train

STEPS = 4

pytestmark = pytest.mark.timeout(900)


def test_stages_take_the_course_of_one_process(ranks, tmp_path):
    """With a tied embedding, experts over the ranks of a stage, an evaluation on the way and a stop half-way."""
    files = make_files(tmp_path, "deepseek_v2", num_hidden_layers=3, tie_word_embeddings=True)

    def run(name: str, world: int, parallel: dict, **changes):
        tree = settings(
            files,
            tmp_path / name,
            "deepseek_v2",
            data={"eval": {"held": str(files / "text.jsonl")}},
            parallel=parallel,
            moe={"balance_loss": "hf", "balance_coef": 0.05},
            train={"steps": STEPS, "eval_every": 2, "eps": 1e-6, "micro_batch_size": 1, **changes},
        )
        assert set(ranks(world, train, tree, timeout=300)) == {0}
        return tmp_path / name

    axes = {"pipeline": 2, "expert": 2, "zero_stage": 1}
    # With one process all rows of a micro-batch of the two data ranks are one micro-batch, which `hf` looks at.
    whole = run("whole", 1, {}, micro_batch_size=2)
    run("cut", 4, axes, stop_at=2)
    cut = run("cut", 4, axes)
    for ours, expected in zip(events(cut, "train"), events(whole, "train"), strict=True):
        assert ours["tokens"] == expected["tokens"]
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert ours["layers"] == expected["layers"]
    for ours, expected in zip(events(cut, "eval"), events(whole, "eval"), strict=True):
        held, wanted = ours["domains"]["held"], expected["domains"]["held"]
        assert (held["tokens"], held["experts"]) == (wanted["tokens"], wanted["experts"])
        assert held["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    expected = stored(whole, STEPS)
    found = stored(cut, STEPS)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        if key[0] == "weights":
            assert relative_error(tensor, expected[key]) < 1e-4, key


def test_a_stage_in_which_nothing_trains(ranks, tmp_path):
    """ESFT in the second layer alone, from the first stage and from the second; saved, and gone on with."""
    files = make_files(tmp_path, "qwen3_moe")

    def run(name: str, world: int, parallel: dict, layer: str, **changes):
        tree = settings(
            files,
            tmp_path / name,
            "qwen3_moe",
            parallel=parallel,
            trainable={"include": ["*.experts.*"], "experts": {layer: [1, 4]}},
            train={"steps": 3, "eps": 1e-6, **changes},
        )
        assert set(ranks(world, train, tree, timeout=300)) == {0}
        return tmp_path / name

    for layer in ("0", "1"):
        whole = run(f"whole-{layer}", 1, {}, layer)
        run(f"cut-{layer}", 2, {"pipeline": 2, "zero_stage": 2}, layer, stop_at=2)
        cut = run(f"cut-{layer}", 2, {"pipeline": 2, "zero_stage": 2}, layer)
        for ours, expected in zip(events(cut, "train"), events(whole, "train"), strict=True):
            assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        expected, found = stored(whole, 3), stored(cut, 3)
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            if key[0] == "weights":
                assert relative_error(tensor, expected[key]) < 1e-4, key
