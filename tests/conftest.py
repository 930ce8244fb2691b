"""Fixtures that all tests share."""

from __future__ import annotations

import os

import pytest

from tests.pool import RankPool

# What the command line and DeepSpeed set for the process that they run in. With RANK left behind, whatever a later test
# starts would take itself for a rank of somebody's launcher.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_addoption(parser):
    parser.addoption("--all-cells", action="store_true", help="every cell of the parity matrix, not the covering ones")
    parser.addoption("--faults", action="store_true", help="those of tests/faults, too, that only its report runs")


def pytest_configure(config):
    config.addinivalue_line("markers", "report_only: of tests/faults, run by its report and not by `make test`")


@pytest.fixture(autouse=True)
def no_rank_is_left_behind():
    yield
    for name in OF_A_RANK:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def ranks():
    """`ranks(world, fn, *args, timeout=60)`: results of `fn(*args)` on each of `world` warm gloo ranks."""
    pools: dict[int, RankPool] = {}

    def run(world: int, fn, *args, timeout: float = 60.0) -> list:
        if world not in pools:
            pools[world] = RankPool(world)
        return pools[world].run(fn, *args, timeout=timeout)

    yield run
    for pool in pools.values():
        pool.close()
