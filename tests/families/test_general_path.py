"""The general path on families that each differ from the named ones in another way; `make families` runs them all."""

from __future__ import annotations

from functools import partial

import pytest

from moe_dist.models.families import FAMILIES
from moe_dist.models.nexus.configuration_nexus import MODEL_TYPES as NEXUS_TYPES
from tests.families.check import RANKS, check
from tests.families.tiny import experts_classes

ODD = {
    "aria": "transposed, stacked on disk under names of its own; by its plan, it can be cut over the tensor axis",
    "ernie4_5_vl_moe": "one list of experts on disk for two modules in memory",
    "muse_spark": "a normalisation behind every expert",
    "nemotron_h": "no gate",
    "qwen3_vl_moe": "stacked on disk, transposed where the shape says so",
}


@pytest.mark.parametrize("family", ODD)
def test_load_gradients_and_export(ranks, tmp_path, family):
    experts = dict(experts_classes())[family]
    result = check(family, experts, tmp_path, partial(ranks, RANKS))
    assert result.stage is None, f"{result.stage}: {result.reason}"
    assert (result.tensor is not None) == (family == "aria"), result.refused


def test_every_named_family_is_among_them():
    assert set(FAMILIES) - set(NEXUS_TYPES) < {family for family, _ in experts_classes()}
