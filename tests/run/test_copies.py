"""Copies of frozen experts beside experts that train: the same course, and nothing of them in a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moe_dist.config.load import build
from moe_dist.config.schema import RunConfig
from moe_dist.errors import UserError
from moe_dist.models import moe_layers
from moe_dist.parallel.grid import build_grid, layout
from moe_dist.train import state
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.dry_run import describe
from moe_dist.train.engine import build_engine
from moe_dist.train.finished import export_run
from moe_dist.train.proof import ChangeProof, differing_copies
from tests.models.compare import file_tensors
from tests.reference import relative_error
from tests.run.runs import assert_same_bits, events, make_files, settings, stored, train

STEPS = 4
EXPERTS = {"0": [1, 5], "1": [0, 2, 6]}  # of seven

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe")


def tree(files: Path, run: Path, *, expert: int, stage: int, spare: int, stop: int = STEPS, **sections) -> dict:
    return settings(
        files,
        run,
        "qwen3_moe",
        trainable={"include": ["*.experts.*"], "experts": EXPERTS},
        parallel={"expert": expert, "zero_stage": stage, "placement": "balanced", "spare_experts": spare},
        train={"steps": STEPS, "stop_at": stop, "eps": 1e-6},
        **sections,
    )


@pytest.mark.parametrize(("world", "expert", "stage"), [(2, 2, 2), (4, 4, 1), (4, 2, 3)])
def test_a_run_with_copies_takes_the_same_course(ranks, files, tmp_path, world, expert, stage):
    plain, copied = tmp_path / "plain", tmp_path / "copied"
    for run, spare in ((plain, 0), (copied, 1)):
        wanted = tree(files, run, expert=expert, stage=stage, spare=spare, moe={"balance_loss": "hf"})
        assert set(ranks(world, train, wanted, timeout=300)) == {0}
    for ours, theirs in zip(events(copied, "train"), events(plain, "train"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["layers"] == theirs["layers"]
    theirs = stored(plain, STEPS)
    for key, tensor in stored(copied, STEPS).items():
        assert relative_error(tensor, theirs[key]) < 1e-4, key
    export_run(copied, tmp_path / "out")
    before, after = file_tensors(files / "qwen3_moe"), file_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {
        name.split(".experts.")[1].split(".")[0] for name in before if not torch.equal(before[name], after[name])
    }
    assert changed == {"0", "1", "2", "5", "6"}


def engine_of(config, plan, grid):
    model = build_model(config, plan, grid)
    return build_engine(model, grid, zero_stage=config.parallel.zero_stage, reduce_bucket_size=300)


def pass_on(tree: dict, source: Path, root: Path) -> None:
    """On each rank: a checkpoint into an engine as configured, and out of it again."""
    config = build(tree)
    grid = build_grid(expert=config.parallel.expert)
    plan = plan_model(config, grid)
    engine = engine_of(config, plan, grid)
    with state.checkpoint.open_checkpoint(source) as opened:
        state.restore(opened, engine, plan)
    state.save(root, STEPS, config, engine, plan, grid, sampler={}, tokens=0)
    engine.close()


def test_a_checkpoint_goes_through_layouts_with_and_without_copies(ranks, files, tmp_path):
    first = tmp_path / "first"
    assert set(ranks(2, train, tree(files, first, expert=2, stage=2, spare=1), timeout=300)) == {0}
    source = first
    for number, (world, expert, stage, spare) in enumerate([(2, 2, 1, 0), (4, 4, 3, 2), (1, 1, 0, 1), (2, 2, 3, 1)]):
        run = tmp_path / f"run{number}"
        wanted = tree(files, run, expert=expert, stage=stage, spare=spare)
        ranks(world, pass_on, wanted, source / "checkpoints" / f"step-{STEPS}", run / "checkpoints", timeout=300)
        assert_same_bits(stored(run, STEPS), stored(first, STEPS))
        source = run


def test_a_run_goes_on_without_copies_and_back(ranks, files, tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert set(ranks(2, train, tree(files, whole, expert=2, stage=1, spare=0), timeout=300)) == {0}
    for world, expert, spare, stop in ((2, 2, 1, 2), (4, 4, 0, 3), (2, 2, 2, 4)):
        wanted = tree(files, parted, expert=expert, stage=1, spare=spare, stop=stop)
        assert set(ranks(world, train, wanted, timeout=300)) == {0}
    for ours, theirs in zip(events(parted, "train"), events(whole, "train"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def a_copy_that_went_astray(tree: dict) -> tuple[list[str], str]:
    config = build(tree)
    grid = build_grid(expert=config.parallel.expert)
    engine = engine_of(config, plan_model(config, grid), grid)
    assert differing_copies(engine, grid) == []
    _, layer = moe_layers(engine.module)[1]
    expert, holders = next(iter(layer.placement.copied.items()))
    if grid.expert_rank == holders[-1]:
        with torch.no_grad():
            layer.frozen.down_proj[layer.frozen.seat_ids.index(expert), 3, 2] += 1e-6
    proof = ChangeProof(engine, grid)  # as if it had been loaded so: nothing changes from here on
    apart = differing_copies(engine, grid)
    try:
        proof.check(engine, lr=1e-3, eps=1e-8)
        said = ""
    except RuntimeError as error:
        said = str(error)
    engine.close()
    return [name.removesuffix(f"[{expert}]") for name in apart], said


def test_the_proof_sees_a_copy_that_differs(ranks, files, tmp_path):
    results = ranks(2, a_copy_that_went_astray, tree(files, tmp_path / "run", expert=2, stage=1, spare=1))
    for apart, said in results:
        assert apart == ["model.layers.1.mlp.experts.down_proj"]
        assert "ranks hold different copies of frozen experts: model.layers.1.mlp.experts.down_proj[" in said


def test_the_configuration_and_what_a_dry_run_says_of_it(files, tmp_path):
    def made(spare: int, world: int = 2, **sections) -> RunConfig:
        return build(tree(files, tmp_path, expert=world, stage=1, spare=spare, **sections))

    def elements(config: RunConfig) -> int:
        """Of the experts of a rank."""
        layers = moe_layers(plan_model(config, layout(2, expert=2)).skeleton)
        return sum(parameter.numel() for _, layer in layers for _, parameter, _ in layer.expert_parameters())

    # Three or four experts a rank, of which one or two train: with pad seats 1 + 3 and 2 + 2; and one more in each.
    assert elements(made(1)) * 8 == elements(made(0)) * 10
    assert "cop" not in describe(made(0), 2)
    assert re.search(r" 2/7 \(1,5\) \+ 2 copies \(\d on 2,\d on 2\) ", describe(made(1), 2))
    assert plan_model(made(1, world=1), layout(1)).placement == "contiguous"
    with pytest.raises(UserError, match=r"spare_experts=1: only with parallel\.placement=balanced"):
        build(settings(files, tmp_path, "qwen3_moe", parallel={"spare_experts": 1}))


def test_where_everything_trains_there_is_nothing_to_copy(files, tmp_path):
    parallel = {"expert": 2, "placement": "balanced", "spare_experts": 1}
    plan = plan_model(build(settings(files, tmp_path, "qwen3_moe", parallel=parallel)), layout(2, expert=2))
    assert [placement.copied for placement in plan.placement.values()] == [{}, {}]
