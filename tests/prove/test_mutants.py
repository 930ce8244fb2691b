"""`prove` notices every planted fault of `tests/mutants`, and raises no alarm without one."""

from __future__ import annotations

import pytest

from tests.models.tiny import make_folder
from tests.mutants.faults import FAULTS
from tests.mutants.planting import Planting
from tests.pool import RankFailure
from tests.prove.cases import certificate_of, config_of, first_off, prepared

CELLS = sorted({fault.cell for fault in FAULTS.values()}, key=str)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """The problem of a cell, with what the plain process makes of it: faults are planted on the ranks alone."""
    made, folders = {}, {}

    def get(cell):
        if cell.family not in folders:
            folders[cell.family] = str(make_folder(cell.family, tmp_path_factory.mktemp(cell.family)))
        if cell not in made:
            made[cell] = prepared(config_of(cell, folders[cell.family]), cell.world, tmp_path_factory.mktemp("proof"))
        return made[cell]

    return get


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_no_alarm_without_a_fault(ranks, problems, cell):
    for certificate in ranks(cell.world, certificate_of, problems(cell), timeout=90):
        assert certificate.holds, certificate.text()
        assert all(check.compared for check in certificate.checks if check.name != "frozen")


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_noticed(ranks, problems, name):
    fault = FAULTS[name]
    planted = Planting(ranks, fault)
    if fault.stops:  # which ends the command with another code than 0, too
        with pytest.raises(RankFailure, match=r"did not answer|failed first"):
            planted(fault.cell.world, first_off, problems(fault.cell), timeout=10)
        return
    for check in planted(fault.cell.world, first_off, problems(fault.cell), timeout=60):
        assert check is not None
        assert not check.holds
