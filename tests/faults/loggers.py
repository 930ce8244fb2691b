"""A logger that is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def in_place_of_wandb(module: object) -> Iterator[None]:
    """Who imports wandb gets `module`. What else is imported meanwhile stays, unlike with `patch.dict`."""
    kept = sys.modules.get("wandb")
    sys.modules["wandb"] = module
    try:
        yield
    finally:
        del sys.modules["wandb"]
        if kept is not None:
            sys.modules["wandb"] = kept
