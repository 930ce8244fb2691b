"""The benchmark of the experts' back ends, on small shapes."""

from __future__ import annotations

import pytest

from benchmarks import experts_backends
from moe_dist.ops import native


@pytest.mark.parametrize("load", experts_backends.LOADS)
def test_loads_are_of_as_many_rows(load):
    counts = experts_backends.LOADS[load](8, 512)
    assert sum(counts) == 512
    assert len(counts) == 8
    assert (max(counts) > 2 * min(counts)) == (load == "skewed")


def test_rows_of_the_table(monkeypatch):
    monkeypatch.setattr(experts_backends, "SIZES", [(8, 16, 8, 64)])
    *rows, note = experts_backends.collect(False)
    names = {
        load: [row["peer_name"] for row in rows if row["case"].endswith(f"fp32, {load}")] for load in ("even", "skewed")
    }
    ours = ["native"] if native.has_cpu() else []
    assert names == {"even": ["loop", "grouped", *ours, "batched"], "skewed": ["loop", "grouped", *ours]}
    assert all(row["ours"] > 0 and row["ratio"] > 0 for row in rows)
    assert note.count("\n- ") == 6
