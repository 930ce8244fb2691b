"""A run that goes on with another number of ranks, expert-parallel size and ZeRO stage takes the same course."""

from __future__ import annotations

import pytest

from tests.reference import relative_error
from tests.run.runs import events, make_files, settings, stored, train, trainer_state

STEPS = 6

pytestmark = pytest.mark.timeout(1800)


def test_the_course_does_not_depend_on_the_ranks(ranks, tmp_path):
    files = make_files(tmp_path, "qwen3_moe")
    whole, parted = tmp_path / "whole", tmp_path / "parted"

    def tree(run, stop, expert, stage):
        return settings(
            files,
            run,
            "qwen3_moe",
            data={"eval": {"held": str(files / "text.jsonl")}},
            parallel={"expert": expert, "zero_stage": stage},
            train={"steps": STEPS, "stop_at": stop, "eps": 1e-6},
        )

    assert ranks(1, train, tree(whole, STEPS, 1, 1), timeout=600) == [0]
    for world, stop, expert, stage in ((1, 2, 1, 0), (2, 4, 2, 3), (2, 5, 1, 2), (1, 6, 1, 1)):
        assert set(ranks(world, train, tree(parted, stop, expert, stage), timeout=600)) == {0}
    assert trainer_state(parted, STEPS) == trainer_state(whole, STEPS)
    ours, theirs = events(parted, "train"), events(whole, "train")
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine["tokens"] == expected["tokens"]
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert mine["layers"] == expected["layers"]
    counted = [[(line["steps"], line["counts"]) for line in events(run, "experts")] for run in (parted, whole)]
    assert counted[0] == counted[1]
    for line, (steps, counts) in zip(ours, counted[0], strict=True):
        halves = [(sum(layer[: (len(layer) + 1) // 2]), sum(layer)) for layer in counts.values()]
        busier = max(2 * max(half, total - half) / total for half, total in halves)
        assert steps == 1
        assert line["rank_load_max"] == pytest.approx(busier if line["step"] in (3, 4) else 1.0)
    held = [line["domains"]["held"] for line in (events(parted, "eval")[-1], events(whole, "eval")[-1])]
    assert held[0]["tokens"] == held[1]["tokens"]
    assert held[0]["loss"] == pytest.approx(held[1]["loss"], rel=1e-5)
    expected = stored(whole, STEPS)
    for key, tensor in stored(parted, STEPS).items():
        if key[0] == "weights":
            assert relative_error(tensor, expected[key]) < 1e-4, key
