"""Every test here says in its name which item of the list it is of."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.faults.items import ITEMS

HERE = Path(__file__).parent
RESULTS = "MOE_DIST_FAULT_RESULTS"  # the file to which the report wants a line of every test
LENT_TIMEOUT_S = 900  # the marks of their own modules do not come along
_NAME = re.compile(r"test_fault_(\d\d)_\w+")


def item_of(name: str) -> int | None:
    """The item that a test is of, None where its name says none."""
    found = _NAME.match(name)
    return int(found.group(1)) if found and int(found.group(1)) in ITEMS else None


def pytest_collection_modifyitems(config, items):
    here = [test for test in items if HERE in test.path.parents]
    nameless = [test.nodeid for test in here if item_of(test.name) is None]
    if nameless:
        raise pytest.UsageError(f"tests of faults are named test_fault_NN_..., after tests/faults/items.py: {nameless}")
    lent = [test for test in here if HERE / "lent" in test.path.parents]
    for test in lent:
        test.add_marker(pytest.mark.timeout(LENT_TIMEOUT_S))
    if not config.getoption("--faults"):
        left_out = [test for test in here if test in lent or test.get_closest_marker("report_only")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [test for test in items if test not in set(left_out)]


def pytest_runtest_logreport(report):
    """A line a phase that says something: the call, and what failed or skipped before or after it."""
    number = item_of(report.nodeid.rpartition("::")[2])
    if RESULTS not in os.environ or number is None:
        return
    reason = ""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    line = {"item": number, "test": report.nodeid, "phase": report.when, "outcome": report.outcome}
    with open(os.environ[RESULTS], "a") as file:
        file.write(json.dumps({**line, "seconds": report.duration, "reason": reason}) + "\n")
