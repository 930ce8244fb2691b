"""A fault and the check of the suite that has to notice it, here and on the ranks of a pool."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from tests.mutants.fault import Fault


@dataclass(frozen=True)
class Case:
    """`check` gets what the test module gives its checks; it fails under the fault, and else not."""

    fault: Fault
    check: Callable


def under(fault: Fault, module: str, function: str, *args):
    """On each rank: a test module's function, with a fault planted."""
    with fault.planted():
        return getattr(importlib.import_module(module), function)(*args)


class Planting:
    """The `ranks` fixture, with a fault planted on every rank."""

    def __init__(self, ranks, fault: Fault):
        self.ranks, self.fault = ranks, fault

    def __call__(self, world: int, fn, *args, timeout: float = 60.0):
        return self.ranks(world, under, self.fault, fn.__module__, fn.__name__, *args, timeout=timeout)
