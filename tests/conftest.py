"""Fixtures that all tests share."""

from __future__ import annotations

import pytest

from tests.pool import RankPool


def pytest_addoption(parser):
    parser.addoption("--all-cells", action="store_true", help="every cell of the parity matrix, not the covering ones")


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
