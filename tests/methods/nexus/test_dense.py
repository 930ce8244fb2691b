"""The dense models that Nexus upcycles are trained by `moe-dist train` too: over ranks, against one plain process."""

from __future__ import annotations

import pytest

from moe_dist.errors import UserError
from moe_dist.models import load_model
from moe_dist.models.routers import router_sites
from moe_dist.models.surgery import swap
from moe_dist.parallel.grid import Grid
from tests.methods.nexus.tiny import DENSE, dense_folder, dense_model
from tests.parity import distributed, plain
from tests.parity.cells import Cell
from tests.parity.test_parity import compare


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize(("layout", "stage"), [((1, 1), 0), ((2, 1), 2), ((2, 2), 1), ((4, 1), 3)], ids=str)
def test_parity_with_a_plain_process(ranks, tmp_path, family, layout, stage):
    """Outputs, every gradient, clip norm and the weights after three steps."""
    folder = str(dense_folder(family, tmp_path / "in"))
    cell = Cell(family, layout, stage, "all", 300, "none", False)
    compare(cell, ranks(cell.world, distributed.train, cell, folder, timeout=120), plain.train(cell, folder))


def test_a_dense_model_is_only_taken_where_it_is_meant(tmp_path):
    folder = dense_folder("llama", tmp_path / "in")
    with pytest.raises(UserError, match="not a known MoE family"):
        load_model(folder)
    with pytest.raises(UserError, match="not a known MoE family"):
        swap(dense_model("llama"), Grid.single())
    with pytest.raises(UserError, match=r"need routers, and this model is dense"):
        router_sites(load_model(folder, dense=True))
