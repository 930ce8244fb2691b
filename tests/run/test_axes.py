"""What a user does with a run on the tensor, sequence and pipeline axes: stop it, go on in another layout, evaluate,
export, look at the record; and what is refused on them."""

from __future__ import annotations

import json

import pytest

from moe_dist.cli.main import main
from moe_dist.errors import EXIT_OK, EXIT_USER
from tests.run.processes import write_config
from tests.run.runs import events, make_files, settings
from tests.run.test_bad_input import called, refused
from tests.run.test_export import plain_loss

STEPS, STOP = 4, 2

pytestmark = pytest.mark.timeout(900)

# family: (ranks, parallel) of the first and of the second half of a run
JOURNEYS = {
    "mixtral": ((4, {"tensor": 2, "expert": 4, "zero_stage": 2}), (2, {"pipeline": 2})),
    "deepseek_v3": ((2, {"pipeline": 2, "zero_stage": 0}), (2, {"sequence": 2, "expert": 2, "zero_stage": 3})),
    "qwen3_moe": ((2, {"sequence": 2}), (4, {"pipeline": 2, "tensor": 2, "expert": 2})),
}


@pytest.mark.parametrize("family", JOURNEYS)
def test_from_layout_to_layout_and_out(ranks, tmp_path, family):
    """With saves in the background, the best kept, the bias of experts moving: all as in one process; and `eval` of the
    run and plain transformers with the exported folder find the loss that the run has found."""
    files = make_files(tmp_path, family)

    def words(name: str, parallel: dict, **changes) -> list[str]:
        tree = settings(
            files,
            tmp_path / name,
            family,
            data={"eval": {"held": {"path": str(files / "text.jsonl"), "limit": 8}}},
            parallel=parallel,
            moe={"expert_bias_rate": 0.05 if family == "deepseek_v3" else 0.0},
            train={"steps": STEPS, "eval_every": STOP, "eps": 1e-6, **changes},
            checkpoint={"background": True, "every": 1, "keep_best": True},
        )
        return ["train", str(write_config(tree, tmp_path / f"{name}.yaml"))]

    (world, first), (then_world, then) = JOURNEYS[family]
    for size, name, parallel, stop in (
        (1, "whole", {}, None),
        (world, "cut", first, STOP),
        (then_world, "cut", then, None),
    ):
        for results in ranks(size, called, words(name, parallel, stop_at=stop), timeout=300):
            assert results[0][0] == EXIT_OK, results[0][2]
    for ours, expected in zip(*(events(tmp_path / name, "train") for name in ("cut", "whole")), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    # The table of what trains has all layers, wherever they are.
    tables = [events(tmp_path / name, "trainable")[0]["layers"] for name in ("cut", "whole")]
    assert [list(table) for table in tables] == [list(tables[1])] * 2
    trained = [[row["experts_trained"] for row in table.values()] for table in tables]
    assert trained[0] == trained[1]

    assert main(["eval", str(tmp_path / "cut"), "--json", str(tmp_path / "held.json")]) == EXIT_OK
    assert main(["export", str(tmp_path / "cut"), str(tmp_path / "exported")]) == EXIT_OK
    found = json.loads((tmp_path / "held.json").read_text())
    told = events(tmp_path / "cut", "eval")[-1]["domains"]["held"]["loss"]
    assert found["step"] == STEPS
    assert found["domains"]["held"]["loss"] == pytest.approx(told, rel=1e-6)
    tree = json.loads((tmp_path / "cut.yaml").read_text())
    assert plain_loss(tree, tmp_path / "exported") == pytest.approx(told, rel=1e-6)


def test_what_cannot_run_is_refused_before_anything_loads(ranks, tmp_path):
    files = make_files(tmp_path, "qwen3_moe", "olmoe")
    run = tmp_path / "run"
    refusals = [
        ("olmoe", {"parallel": {"tensor": 2}}, "colwise_gather_output"),
        ("qwen3_moe", {"parallel": {"sequence": 2}, "data": {"seq_len": 25}}, "data.seq_len=25"),
        ("qwen3_moe", {"parallel": {"sequence": 2, "tensor": 2}}, "need at least 4 ranks"),
        ("qwen3_moe", {"parallel": {"sequence": 2}, "model": {"attention": "flex_attention"}}, "take eager or sdpa"),
        ("qwen3_moe", {"parallel": {"pipeline": 2}, "moe": {"expert_bias_rate": 0.1}}, "no balancing bias"),
        ("qwen3_moe", {"parallel": {"tensor": 2, "zero_stage": 3}, "moe": {"overlap": True}}, "moe.overlap=true needs"),
    ]
    calls = []
    for number, (family, sections, _) in enumerate(refusals):
        model = {"path": str(files / family), **sections.pop("model", {})}
        tree = settings(files, run, family, model=model, **sections)
        calls.append(["train", str(write_config(tree, tmp_path / f"{number}.yaml"))])
    alone = called(*([*words, "--dry-run", "--ranks", "2"] for words in calls))
    for result, (_, _, said) in zip(alone, refusals, strict=True):
        refused(run, result, said)
    for result, other, (_, _, said) in zip(*ranks(2, called, *calls, timeout=120), refusals, strict=True):
        assert (result[0], other[0]) == (EXIT_USER, EXIT_USER), result[2]
        assert said in result[2]
        assert "Traceback" not in result[2] + other[2]
    assert [path.name for path in run.rglob("*") if path.is_file()] == []
