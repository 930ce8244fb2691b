"""What is counted over ranks: every token once, whatever axes share its row; and figures of all stages on each."""

import pytest
import torch
from torch import nn

from moe_dist.config.schema import MoeSection
from moe_dist.models import load_model
from moe_dist.parallel.grid import Grid, build_grid
from moe_dist.parallel.sequence import own_slice
from moe_dist.train.agree import agree
from moe_dist.train.routing import Routing
from moe_dist.train.rows import rank_rows
from tests.models.tiny import VOCAB, make_folder

LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_folder("mixtral", tmp_path_factory.mktemp("routing"), num_hidden_layers=LAYERS))


def rows_of(data_rank: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(data_rank))
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    batch["position_ids"] = torch.arange(8).repeat(2, 1)
    batch["attention_mask"][1, 5 + data_rank :] = 0
    batch["labels"][0, :3] = -100
    return batch


class Passed(nn.Module):
    """In the place of a layer that is on another stage."""

    def forward(self, hidden, *args, **kwargs):
        return hidden


def counted(folder: str, axes: dict[str, int]) -> tuple[dict, dict, tuple]:
    """Of one forward of whole rows, of which each rank counts its slice's tokens and its stage's layers."""
    grid = build_grid(**axes)
    model = load_model(folder, Grid.single()).eval()
    stage = range(LAYERS) if grid.pipeline == 1 else range(1) if grid.is_first_stage else range(1, LAYERS)
    for index in range(LAYERS):
        if index not in stage:
            model.model.layers[index] = Passed()
    routing = Routing(model, MoeSection(), grid)
    routing.start_step()
    batch = rows_of(grid.data_rank)
    rows = rank_rows(batch, grid)
    # The routers' choice does not matter here, only who counts which token: position l goes to experts l % 5 and
    # (l + layer) % 5, the second twice as often where they coincide.
    for index, (_, layer) in zip(stage, routing.layers, strict=True):
        place_BS = own_slice(batch["position_ids"], grid)[rows.real_BS]
        chosen = torch.stack([place_BS % 5, (place_BS + index) % 5])
        layer.statistics.add(torch.bincount(chosen.flatten(), minlength=5), 0)
    routing.end_step(skipped=False)
    return routing.figures(), routing.window(), agree([batch, batch], False, 1, grid)


@pytest.mark.parametrize(
    "axes",
    [{"sequence": 2}, {"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "sequence": 2}, {"sequence": 2, "tensor": 2}],
)
def test_every_token_is_counted_once(ranks, folder, axes):
    world, shared = 4, 1
    for size in axes.values():
        shared *= size
    batches = [rows_of(rank) for rank in range(world // shared)]
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    labels = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    counts = {}
    for index in range(LAYERS):
        places = [batch["position_ids"][batch["attention_mask"].bool()] for batch in batches]
        both = torch.cat([(place + shift) % 5 for place in places for shift in (0, index)])
        counts[str(index)] = torch.bincount(both, minlength=5).tolist()
    for figures, window, agreed in ranks(world, counted, folder, axes):
        assert window["counts"] == counts
        assert window["steps"] == 1
        assert list(figures["layers"]) == [str(index) for index in range(LAYERS)]
        assert figures["load_max"] == max(max(got) * 5 / sum(got) for got in counts.values())
        assert agreed == (2 * labels, 2 * real, False, world)
