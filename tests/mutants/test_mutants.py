"""Every planted fault must make the parity comparison fail, and only the fault: the clean cells pass."""

from __future__ import annotations

import pytest

from tests.models.tiny import make_folder
from tests.mutants.faults import FAULTS
from tests.parity import distributed, plain
from tests.parity.test_parity import compare
from tests.pool import RankFailure


def train_with(name: str, cell, folder: str) -> dict:
    with FAULTS[name].planted():
        return distributed.train(cell, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(family: str, *, tied: bool = False) -> str:
        if (family, tied) not in made:
            changes = {"tie_word_embeddings": True} if tied else {}
            made[family, tied] = str(make_folder(family, tmp_path_factory.mktemp(family), **changes))
        return made[family, tied]

    return get


@pytest.mark.parametrize(
    ("cell", "tied"),
    sorted({(fault.cell, fault.tied) for fault in FAULTS.values()}, key=str),
    ids=lambda value: str(value) if value is not True else "tied",
)
def test_the_clean_cell_passes(ranks, folders, cell, tied):
    folder = folders(cell.family, tied=tied)
    compare(cell, ranks(cell.world, distributed.train, cell, folder, timeout=90), plain.train(cell, folder))


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_caught(ranks, folders, name):
    fault = FAULTS[name]
    folder = folders(fault.cell.family, tied=fault.tied)
    expected = plain.train(fault.cell, folder)
    if fault.stops:
        with pytest.raises(RankFailure, match=r"did not answer|failed first"):
            ranks(fault.cell.world, train_with, name, fault.cell, folder, timeout=10)
        return
    results = ranks(fault.cell.world, train_with, name, fault.cell, folder, timeout=90)
    with pytest.raises(AssertionError):
        compare(fault.cell, results, expected)


def test_there_are_at_least_twenty():
    assert len(FAULTS) >= 20
