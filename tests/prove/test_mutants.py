"""`prove` notices every planted fault of `tests/mutants`, and raises no alarm without one."""

from __future__ import annotations

import pytest

from tests.models.tiny import make_folder
from tests.mutants.faults import FAULTS
from tests.mutants.planting import Planting
from tests.pool import RankFailure
from tests.prove.cases import certificate_of, config_of, first_off, prepared

CELLS = sorted({(fault.cell, fault.tied) for fault in FAULTS.values()}, key=str)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """The problem of a cell, with what the plain process makes of it: faults are planted on the ranks alone."""
    made = {}

    def get(cell, tied):
        if (cell, tied) not in made:
            changes = {"tie_word_embeddings": True} if tied else {}
            folder = make_folder(cell.family, tmp_path_factory.mktemp(cell.family), **changes)
            made[cell, tied] = prepared(config_of(cell, str(folder)), cell.world, tmp_path_factory.mktemp("proof"))
        return made[cell, tied]

    return get


@pytest.mark.parametrize(("cell", "tied"), CELLS, ids=lambda value: str(value) if value is not True else "tied")
def test_no_alarm_without_a_fault(ranks, problems, cell, tied):
    for certificate in ranks(cell.world, certificate_of, problems(cell, tied), timeout=90):
        assert certificate.holds, certificate.text()
        assert all(check.compared for check in certificate.checks if check.name != "frozen")


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_noticed(ranks, problems, name):
    fault = FAULTS[name]
    planted = Planting(ranks, fault)
    if fault.stops:  # which ends the command with another code than 0, too
        with pytest.raises(RankFailure, match=r"did not answer|failed first"):
            planted(fault.cell.world, first_off, problems(fault.cell, fault.tied), timeout=10)
        return
    for check in planted(fault.cell.world, first_off, problems(fault.cell, fault.tied), timeout=60):
        assert check is not None
        assert not check.holds
