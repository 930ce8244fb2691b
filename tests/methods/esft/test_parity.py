"""E9: ESFT under EP 1, 2, 4 and ZeRO 0 to 3 is ESFT on one plain transformers process.

The selection takes three experts of the first layer, all on the first half of the ranks, and none of the second: a rank
has nothing to train, and so has a layer. Buckets of 300 elements flush in the middle of tensors.
"""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch

from moe_dist import checkpoint
from moe_dist.config.load import build
from moe_dist.data.attention import model_inputs
from moe_dist.models import load_model, moe_layers
from moe_dist.parallel.grid import build_grid
from moe_dist.train import loop, state
from moe_dist.train.build import build_model, plan_model
from tests.models.tiny import make_folder
from tests.parity import distributed, plain
from tests.parity.cells import Cell
from tests.parity.test_parity import compare
from tests.reference import relative_error
from tests.run.runs import make_files, settings, sha256, stored

CELLS = [
    Cell("qwen3_moe", (max(2, ep), ep), stage, "one layer", 300, "none", recompute=stage % 2 == 1)
    for ep in (1, 2, 4)
    for stage in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_folder("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe")))


def train_and_hash(cell: Cell, folder: str) -> tuple[dict, dict, dict]:
    """On each rank: what the parity matrix compares, and sha256 of every frozen parameter before and after."""
    real, kept = distributed.build_engine, []

    def frozen(engine) -> dict[str, str]:
        trains = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        return {name: sha256(tensor) for name, tensor in engine.full_parameters() if name not in trains}

    def build_engine(*args, **options):
        engine = real(*args, **options)
        close = engine.close
        kept.append(frozen(engine))

        def hash_and_close() -> None:
            kept.append(frozen(engine))
            close()

        engine.close = hash_and_close
        return engine

    with patch.object(distributed, "build_engine", build_engine):
        result = distributed.train(cell, folder)
    return result, *kept


def held_trainable(cell: Cell, folder: str) -> list[int]:
    """On each rank: experts of its own that train, layer by layer."""
    from tests.parity import problem

    grid = build_grid(expert=cell.expert)
    model = build_model(problem.config(cell, folder), plan_model(problem.config(cell, folder), grid), grid)
    return [0 if layer.trainable is None else layer.trainable.held for _, layer in moe_layers(model)]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradients_and_weights_are_those_of_one_process_and_frozen_bytes_stay(ranks, folder, cell):
    results = ranks(cell.world, train_and_hash, cell, folder, timeout=60)
    compare(cell, [result for result, _, _ in results], plain.train(cell, folder))
    for _, before, after in results:
        assert len(before) > 10
        assert before == after


def test_the_selection_leaves_a_rank_and_a_layer_without(ranks, folder):
    found = ranks(4, held_trainable, CELLS[-1], folder)
    assert [layers[1] for layers in found] == [0] * 4
    assert [layers[0] for layers in found] == [1, 2, 0, 0]


def logits_of(tree: dict, step: int, ids: list) -> np.ndarray:
    """On each rank: logits of the model as configured, with the weights of a checkpoint of its run laid over."""
    config = build(tree)
    grid = build_grid(expert=config.parallel.expert)
    plan = plan_model(config, grid)
    model = build_model(config, plan, grid).eval()
    with checkpoint.open_checkpoint(f"{config.run.dir}/checkpoints/step-{step}") as opened:
        state.load_weights(opened, model)
    ids_BL = torch.tensor(ids)
    batch = {"input_ids": ids_BL, "position_ids": torch.arange(ids_BL.shape[1]).expand(ids_BL.shape)}
    with torch.no_grad():
        return model(**model_inputs(batch, model.config)).logits.numpy()


def train_run(tree: dict) -> int:
    return loop.train(build(tree))


def test_a_checkpoint_of_two_expert_ranks_is_the_same_model_on_one(ranks, tmp_path):
    files = make_files(tmp_path, "qwen3_moe")
    tree = settings(
        files,
        tmp_path / "run",
        "qwen3_moe",
        parallel={"expert": 2, "zero_stage": 2},
        trainable={"experts": {"0": [0, 2, 3]}, "shared_experts": False, "non_expert_modules": False},
        train={"steps": 3},
    )
    assert ranks(2, train_run, tree, timeout=120) == [0, 0]
    ids = torch.randint(3, 290, (2, 17), generator=torch.Generator().manual_seed(1)).tolist()
    first, second = ranks(2, logits_of, tree, 3, ids)
    assert (first == second).all()
    alone_tree = {**tree, "parallel": {}}
    (alone,) = ranks(1, logits_of, alone_tree, 3, ids)
    assert relative_error(torch.from_numpy(first), torch.from_numpy(alone)) < 1e-6
    assert (first.argmax(-1) == alone.argmax(-1)).all()
    # The weights themselves: to the bit, and not those of the start.
    masters = stored(tmp_path / "run", 3)
    model = load_model(files / "qwen3_moe")
    before = dict(moe_layers(model))
    changed = 0
    for (kind, name, expert), master in masters.items():
        path, _, part = name.rpartition(".")
        if kind == "weights":
            stock = next(p for n, p, _ in before[path].expert_parameters() if n == part)[expert]
            changed += not torch.equal(stock, master)
    assert changed == 6  # two products of three experts
