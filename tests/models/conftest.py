"""Folders of tiny models, made once for the whole test run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.tiny import make_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny(family, **options of make_folder)` -> a folder; the same arguments give the same folder."""
    made: dict[tuple, Path] = {}

    def get(family: str, **options) -> Path:
        key = (family, *sorted((name, str(value)) for name, value in options.items()))
        if key not in made:
            made[key] = make_folder(family, tmp_path_factory.mktemp(family), **options)
        return made[key]

    return get
