"""Fixtures that all tests share."""

from __future__ import annotations

import pytest

from tests.pool import RankPool


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
