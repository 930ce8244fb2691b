"""What a planted fault is."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from tests.parity.cells import Cell

BASE = Cell("qwen3_moe", (2, 2), 1, "all", 50_000_000, "none", False)


@dataclass(frozen=True)
class Fault:
    """`replace` gets what `target` ("module:attribute path") is now and returns what is planted in its place.

    cell: the training that has to notice it. stops: the ranks raise or hang in place of finishing. tied: in a model
    whose head is its embedding.
    """

    target: str
    replace: Callable
    cell: Cell = BASE
    stops: bool = False
    tied: bool = False

    @contextlib.contextmanager
    def planted(self):
        module_name, _, path = self.target.partition(":")
        owner = importlib.import_module(module_name)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original = owner.__dict__[name]
        unwrapped = original.__func__ if isinstance(original, staticmethod) else original
        planted = self.replace(unwrapped)
        setattr(owner, name, staticmethod(planted) if isinstance(original, staticmethod) else planted)
        try:
            yield
        finally:
            setattr(owner, name, original)
