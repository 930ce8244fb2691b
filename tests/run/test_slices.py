"""A whole run whose rows are cut over ranks takes the course of one process: losses, routing, evaluation, weights."""

from __future__ import annotations

import pytest

from tests.reference import relative_error
from tests.run.runs import events, make_files, settings, stored, train

STEPS = 3

pytestmark = pytest.mark.timeout(900)

RUNS = {
    "qwen3_moe": (2, {"sequence": 2, "expert": 2}, {"balance_loss": "layer_sequence", "z_loss_coef": 1e-2}),
    "deepseek_v3": (2, {"sequence": 2}, {"balance_loss": "layer_global", "expert_bias_rate": 1e-2}),
    "mixtral": (4, {"sequence": 2, "tensor": 2, "expert": 4, "zero_stage": 2}, {"balance_loss": "layer_micro"}),
}


@pytest.mark.parametrize("family", RUNS)
def test_cut_rows_take_the_course_of_whole_ones(ranks, tmp_path, family):
    files = make_files(tmp_path, family)
    world, axes, moe = RUNS[family]

    def run(name: str, world: int, parallel: dict):
        tree = settings(
            files,
            tmp_path / name,
            family,
            data={"eval": {"held": str(files / "text.jsonl")}},
            parallel=parallel,
            moe={"balance_coef": 0.05, **moe},
            train={"steps": STEPS, "eps": 1e-6, "micro_batch_size": 2},
        )
        assert set(ranks(world, train, tree, timeout=300)) == {0}
        return tmp_path / name

    whole, cut = run("whole", 1, {}), run("cut", world, axes)
    for ours, expected in zip(events(cut, "train"), events(whole, "train"), strict=True):
        assert ours["tokens"] == expected["tokens"]
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert ours["layers"] == expected["layers"]
    counted = [[(line["steps"], line["counts"]) for line in events(at, "experts")] for at in (cut, whole)]
    assert counted[0] == counted[1]
    held = [events(at, "eval")[-1]["domains"]["held"] for at in (cut, whole)]
    assert held[0]["tokens"] == held[1]["tokens"]
    assert held[0]["experts"] == held[1]["experts"]
    assert held[0]["loss"] == pytest.approx(held[1]["loss"], rel=1e-5)
    expected = stored(whole, STEPS)
    for key, tensor in stored(cut, STEPS).items():
        if key[0] == "weights":
            assert relative_error(tensor, expected[key]) < 1e-4, key
