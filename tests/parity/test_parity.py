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
from tests.parity.axes import axis_cells
from tests.parity.cells import Cell, covering_cells, every_cell
from tests.parity.problem import LENGTH, VOCAB
from tests.reference import relative_error
from tests.train.runner import assembled

OUTPUTS, GRADIENTS, NORMS, WEIGHTS = 2e-6, 2e-6, 2e-6, 1e-5


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        cells = every_cell() if metafunc.config.getoption("--all-cells") else covering_cells()
        cells += axis_cells()
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
        compare_outputs(cell, rank, result, expected)
    heads = [result["logits"] for result in results if result["logits"]]
    assert len(heads) * cell.axes[0] == cell.world, "ranks of the last stage without logits"
    assert {layer for result in results for layer in result["ids"]} == expected["ids"][0].keys(), "layers not heard"
    for kind, tolerance in (("gradients", GRADIENTS), ("weights", WEIGHTS)):
        found = assembled([result[kind] for result in results])
        assert found.keys() == expected[kind].keys(), f"{kind}: {found.keys() ^ expected[kind].keys()}"
        errors = {key: relative_error(found[key], wanted) for key, wanted in expected[kind].items()}
        worst = max(errors, key=errors.get)
        assert errors[worst] < tolerance, f"{kind} of {worst}: {errors[worst]:.2e}"
    error = relative_error(
        torch.tensor([result["losses"] for result in results]).sum(0), torch.tensor(expected["losses"])
    )
    assert error < OUTPUTS, f"losses: {error:.2e}"
    for rank, result in enumerate(results):
        error = relative_error(torch.tensor(result["norms"]), torch.tensor(expected["norms"]))
        assert error < NORMS, f"norms of rank {rank}: {result['norms']} against {expected['norms']}"


def compare_outputs(cell: Cell, rank: int, result: dict, expected: dict) -> None:
    """This rank's part of the logits, and which experts its tokens went to."""
    place = result["place"]
    block, vocabulary = LENGTH // cell.axes[1], VOCAB // cell.axes[2]
    slice_length = block // cell.axes[2]
    rows = range(place["data_rank"], len(expected["logits"]), cell.data)

    def own(whole: torch.Tensor, number: int, length: int) -> torch.Tensor:
        """Of a row without its padding: this rank's part, which may be empty."""
        return whole[number * length : (number + 1) * length]

    for row, logits in zip(rows, result["logits"], strict=bool(result["logits"])):
        wanted = own(expected["logits"][row], place["sequence_rank"], block)
        wanted = wanted[:, place["tensor_rank"] * vocabulary : (place["tensor_rank"] + 1) * vocabulary]
        error = relative_error(torch.from_numpy(logits)[: len(wanted)], wanted)
        assert error < OUTPUTS, f"logits of row {row} on rank {rank}: {error:.2e}"
    for layer, seen in result["ids"].items():
        for row, ids in zip(rows, seen, strict=True):
            wanted = own(expected["ids"][row][layer].sort().values, place["slice_rank"], slice_length)
            same = torch.from_numpy(ids).sort().values[: len(wanted)] == wanted
            assert same.all(), f"row {row}, layer {layer}: other experts were chosen"


def test_the_covering_cells_hold_every_pair():
    from itertools import combinations

    from tests.parity.cells import AXES

    names = list(Cell.__dataclass_fields__)[: len(AXES)]
    cells = [tuple(getattr(cell, name) for name in names) for cell in covering_cells()]
    for a, b in combinations(range(len(AXES)), 2):
        assert {(cell[a], cell[b]) for cell in cells} == {(x, y) for x in AXES[a] for y in AXES[b]}
