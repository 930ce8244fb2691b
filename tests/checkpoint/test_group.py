"""One answer for all ranks."""

from __future__ import annotations

import pytest

from moe_dist.checkpoint import SINGLE, CheckpointError, NoSpaceError
from moe_dist.checkpoint.group import all_or_none
from tests.checkpoint.worlds import on_threads


def test_every_rank_gets_every_result():
    results = on_threads(3, lambda group: all_or_none(group, lambda: group.rank * 10, what="x"))
    assert results == [[0, 10, 20]] * 3
    assert all_or_none(SINGLE, lambda: "alone", what="x") == ["alone"]


def test_every_rank_gets_every_error_and_the_cause_stays_where_it_was():
    def work(group):
        def fails():
            if group.rank == 1:
                raise NoSpaceError("full")
            if group.rank == 2:
                raise KeyError("what")

        return all_or_none(group, fails, what="not saved")

    errors = on_threads(3, work)
    assert {type(error) for error in errors} == {NoSpaceError}
    assert {str(error) for error in errors} == {"not saved: rank 1: full; rank 2: KeyError: 'what'"}
    assert [type(error.__cause__) for error in errors] == [type(None), NoSpaceError, KeyError]


def test_one_process_speaks_of_no_ranks():
    def fails():
        raise OSError("gone")

    with pytest.raises(CheckpointError, match=r"^not saved: OSError: gone$"):
        all_or_none(SINGLE, fails, what="not saved")
