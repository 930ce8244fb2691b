"""`checkpoint.keep_best`: the model with the lowest held-out loss outlives newer ones, and is what others take."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest

from moe_dist.checkpoint import SINGLE, best_step, find_latest
from moe_dist.config.load import build
from moe_dist.errors import EXIT_OK, UserError
from moe_dist.train import loop
from moe_dist.train.best import Best
from moe_dist.train.finished import chosen_checkpoint, evaluate_run, export_run
from tests.models.compare import file_tensors, same_bits
from tests.run.runs import events, make_files, settings, stored, trainer_state

STEPS = 6

pytestmark = pytest.mark.timeout(1200)


def overfitting(files, run, **sections) -> dict:
    """A run whose held-out loss falls and then rises: it learns four texts by heart, at a rate far too high."""
    lines = (files / "text.jsonl").read_text().splitlines(keepends=True)
    (files / "few.jsonl").write_text("".join(lines[:4]))
    (files / "other.jsonl").write_text("".join(json.dumps({"text": f"{n} {n * n} {-n}"}) + "\n" for n in range(8)))
    data = {
        "train": str(files / "few.jsonl"),
        "eval": {
            "text": {"path": str(files / "text.jsonl"), "limit": 8},
            "other": {"path": str(files / "other.jsonl")},
        },
    }
    tree = settings(
        files,
        run,
        "qwen3_moe",
        data=data,
        train={"steps": STEPS, "lr": 0.2, "eval_every": 1},
        checkpoint={"keep_best": True, "keep": 1, "every": 1},
        parallel={"expert": 2, "zero_stage": 2},
    )
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return tree


def go_on(tree: dict, **options) -> int:
    return loop.train(build(tree), **options)


def means(run) -> dict[int, float]:
    """Step -> mean of the domains' losses, from metrics.jsonl."""
    return {
        line["step"]: sum(d["loss"] for d in line["domains"].values()) / len(line["domains"])
        for line in events(run, "eval")
    }


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory):
    """(files, run folder): the run in one go."""
    files = make_files(tmp_path_factory.mktemp("best"), "qwen3_moe")
    run = files / "whole"
    assert ranks(2, go_on, overfitting(files, run), timeout=300) == [EXIT_OK] * 2
    return files, run


def test_the_lowest_mean_over_the_domains_is_kept(whole):
    _, run = whole
    by_step = means(run)
    assert sorted(by_step) == list(range(1, STEPS + 1))
    lowest = min(by_step, key=by_step.get)
    assert 1 <= lowest < STEPS, "this test needs a run that gets worse"
    assert best_step(run / "checkpoints") == lowest
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {f"step-{lowest}", f"step-{STEPS}"}
    assert chosen_checkpoint(run).name == f"step-{lowest}"
    assert chosen_checkpoint(run / "checkpoints" / f"step-{STEPS}").name == f"step-{STEPS}"
    assert find_latest(run / "checkpoints").path.name == f"step-{STEPS}"
    assert trainer_state(run, STEPS)["best"]["loss"] == by_step[lowest]


def test_export_and_evaluation_take_it_and_say_so(whole, tmp_path, capsys):
    files, run = whole
    by_step = means(run)
    lowest = min(by_step, key=by_step.get)
    assert export_run(run, tmp_path / "best")[1] == lowest
    assert f"taking step-{lowest}, the best by held-out loss" in capsys.readouterr().err
    export_run(run / "checkpoints" / f"step-{lowest}", tmp_path / "named")
    same_bits(file_tensors(tmp_path / "best"), file_tensors(tmp_path / "named"))
    assert export_run(run / "checkpoints" / f"step-{STEPS}", tmp_path / "last")[1] == STEPS
    step, results = evaluate_run(build({**overfitting(files, run), "parallel": {}}))
    assert step == lowest
    assert sum(d["loss"] for d in results.values()) / 2 == pytest.approx(by_step[lowest], rel=1e-6)


@pytest.mark.parametrize("every", [1, 4])
def test_a_run_that_was_stopped_knows_it_still(ranks, whole, every):
    """Stopped behind the best, and gone on with one rank and another spacing of checkpoints."""
    files, first = whole
    by_step = means(first)
    lowest = min(by_step, key=by_step.get)
    run = files / f"stopped-{every}"
    tree = overfitting(files, run, checkpoint={"every": every})
    tree["train"]["stop_at"] = lowest + 1
    assert ranks(2, go_on, tree, timeout=300) == [EXIT_OK] * 2
    assert best_step(run / "checkpoints") == lowest
    # As a kill between the rename of the folder and the move of the name leaves it.
    (run / "checkpoints" / "best").unlink()
    del tree["train"]["stop_at"]
    assert ranks(2, go_on, tree, timeout=300) == [EXIT_OK] * 2
    assert means(run) == by_step
    assert best_step(run / "checkpoints") == lowest
    assert trainer_state(run, STEPS) == trainer_state(first, STEPS)
    ours, theirs = stored(run, lowest), stored(first, lowest)
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)


@pytest.mark.parametrize("keep", [True, False])
def test_it_is_forgotten_with_the_text_it_was_measured_on(ranks, whole, keep):
    """And with the key that asks for it: no name is left behind for others to take."""
    files, _ = whole
    run = files / f"changed-{keep}"
    tree = overfitting(files, run)
    tree["train"]["stop_at"] = STEPS - 1
    assert ranks(2, go_on, tree, timeout=300) == [EXIT_OK] * 2
    assert best_step(run / "checkpoints") < STEPS - 1
    del tree["train"]["stop_at"], tree["data"]["eval"]["text"]
    tree["checkpoint"]["keep_best"] = keep
    assert ranks(2, go_on, tree, timeout=300) == [EXIT_OK] * 2
    assert best_step(run / "checkpoints") == (STEPS if keep else None)
    assert chosen_checkpoint(run).name == f"step-{STEPS}"


def test_what_is_no_candidate():
    tree = {
        "model": {"config": {"model_type": "qwen3_moe"}, "tokenizer": "offline"},
        "data": {"train": "some.jsonl", "eval_fraction": 0.1},
        "train": {"steps": 10, "eval_every": 4},
        "checkpoint": {"keep_best": True},
    }
    domains = {"a": SimpleNamespace(rows=SimpleNamespace(meta={"identity": 1}))}
    best = Best(build(tree), domains, SINGLE)
    assert [step for step in range(1, 11) if best.counts(step)] == [4, 8, 10]
    assert not best.judge(4, {"a": {"loss": math.nan}})
    assert best.judge(8, {"a": {"loss": 2.0}, "b": {"loss": 4.0}})
    assert not best.judge(10, {"a": {"loss": 3.0}, "b": {"loss": 3.0}})
    assert (best.step, best.loss) == (8, 3.0)
    tree["checkpoint"]["keep_best"] = False
    assert not any(Best(build(tree), domains, SINGLE).counts(step) for step in range(1, 11))


@pytest.mark.parametrize("change", [{"train": {"eval_every": 0}}, {"data": {"train": "some.jsonl"}}])
def test_it_needs_something_to_go_by(change):
    tree = {
        "model": {"config": {"model_type": "qwen3_moe"}, "tokenizer": "offline"},
        "data": {"train": "some.jsonl", "eval_fraction": 0.1},
        "train": {"eval_every": 4},
        "checkpoint": {"keep_best": True},
    }
    with pytest.raises(UserError, match=r"checkpoint\.keep_best=true: needs held-out text"):
        build({**tree, **change})


def test_a_missing_best_is_an_error(whole, tmp_path):
    _, run = whole
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{best_step(run / 'checkpoints')}")
    with pytest.raises(UserError, match="which is no checkpoint there"):
        export_run(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
