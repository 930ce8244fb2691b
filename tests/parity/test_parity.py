"""Outputs, every gradient, clip norm, and the weights after three steps, against one plain transformers process.

`make test` runs a covering set of cells, `make parity` all of them.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from moe_dist.ops import experts_batched, grouped_mlp
from tests.models.tiny import make_folder
from tests.parity import distributed, plain
from tests.parity.cells import Cell, covering_cells, every_cell
from tests.reference import relative_error
from tests.train.runner import assembled

OUTPUTS, GRADIENTS, NORMS, WEIGHTS = 2e-6, 2e-6, 2e-6, 1e-5


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        cells = every_cell() if metafunc.config.getoption("--all-cells") else covering_cells()
        # One pool of ranks after the other, and the cells of a family together.
        cells.sort(key=lambda cell: (cell.world, cell.family))
        metafunc.parametrize("cell", cells, ids=str)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(family: str) -> str:
        if family not in made:
            made[family] = str(make_folder(family, tmp_path_factory.mktemp(family)))
        return made[family]

    return get


def test_cell(ranks, folders, cell):
    folder = folders(cell.family)
    compare(cell, ranks(cell.world, distributed.train, cell, folder, timeout=90), plain.train(cell, folder))


def train_with(backend: str, cell: Cell, folder: str) -> dict:
    """On each rank: what `distributed.train` gives, and how often that back end was called."""
    module = grouped_mlp.BACKENDS[backend]
    with (
        mock.patch.object(experts_batched, "MOST_PADDED", float("inf")),  # these rows are few
        mock.patch.object(module, "forward", wraps=module.forward) as forward,
        mock.patch.object(module, "backward", wraps=module.backward) as backward,
    ):
        result = distributed.train(cell, folder, backend=backend)
    return {**result, "calls": min(forward.call_count, backward.call_count)}


BACKEND_CELLS = {
    "batched": Cell("qwen3_moe", (2, 2), 2, "some", 300, "hf", True),
    "grouped": Cell("gpt_oss", (2, 1), 1, "all", 300, "none", False),
    "loop": Cell("deepseek_v3", (2, 2), 3, "one rank", 300, "none", False),
}


@pytest.mark.parametrize("backend", BACKEND_CELLS)
def test_a_named_back_end(ranks, folders, backend):
    cell = BACKEND_CELLS[backend]
    folder = folders(cell.family)
    results = ranks(cell.world, train_with, backend, cell, folder, timeout=90)
    assert all(result["calls"] > 0 for result in results)
    compare(cell, results, plain.train(cell, folder))


def compare(cell: Cell, results: list[dict], expected: dict) -> None:
    """Raise AssertionError naming the first thing that differs."""
    for rank, result in enumerate(results):
        mine = range(rank, len(expected["logits"]), cell.world)
        for place, row in enumerate(mine):
            for layer, ids in enumerate(result["ids"][place]):
                same = torch.from_numpy(ids).sort().values == expected["ids"][row][layer].sort().values
                assert same.all(), f"row {row}, layer {layer}: other experts were chosen"
            error = relative_error(torch.from_numpy(result["logits"][place]), expected["logits"][row])
            assert error < OUTPUTS, f"logits of row {row}: {error:.2e}"
    for kind, tolerance in (("gradients", GRADIENTS), ("weights", WEIGHTS)):
        found = assembled([result[kind] for result in results])
        assert found.keys() == expected[kind].keys(), f"{kind}: {found.keys() ^ expected[kind].keys()}"
        errors = {key: relative_error(found[key], wanted) for key, wanted in expected[kind].items()}
        worst = max(errors, key=errors.get)
        assert errors[worst] < tolerance, f"{kind} of {worst}: {errors[worst]:.2e}"
    for rank, result in enumerate(results):
        error = relative_error(torch.tensor(result["norms"]), torch.tensor(expected["norms"]))
        assert error < NORMS, f"norms of rank {rank}: {result['norms']} against {expected['norms']}"


def test_the_covering_cells_hold_every_pair():
    from itertools import combinations

    from tests.parity.cells import AXES

    cells = [tuple(getattr(cell, name) for name in Cell.__dataclass_fields__) for cell in covering_cells()]
    for a, b in combinations(range(len(AXES)), 2):
        assert {(cell[a], cell[b]) for cell in cells} == {(x, y) for x in AXES[a] for y in AXES[b]}
