"""Copies of frozen experts: filled wherever they sit, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_dist.errors import UserError
from moe_dist.models import export_model, init_model, load_model, moe_layers
from moe_dist.moe.placement import balance, from_lists
from moe_dist.parallel.grid import build_grid
from tests.models.compare import file_tensors, same_bits
from tests.models.tiny import CONFIGS


def placements(model_type: str, expert: int) -> dict:
    config = CONFIGS[model_type]
    count = config.get("num_experts") or config["num_local_experts"]
    lists = balance(range(1, count + 1), ranks=expert, trainable=[1], spare=2)
    placed = from_lists(lists, num_experts=count, trainable=[1], load_E=range(1, count + 1))
    return {f"model.layers.{layer}.mlp.experts": placed for layer in range(2)}


def seats_and_files(folder: Path, family: str, out: Path) -> int:
    """On each rank: load, compare every seat with the whole model, initialise likewise, export. Returns copies seen."""
    grid = build_grid(expert=2)
    where = {"trainable": {f"model.layers.{layer}.mlp.experts": [1] for layer in range(2)}}
    where["placement"] = placements(family, 2)
    model, alone = load_model(folder, grid, **where), load_model(folder)
    made, made_alone = init_model(alone.config.to_dict(), grid, **where), init_model(alone.config.to_dict())
    copies = 0
    for ours, whole in ((model, alone), (made, made_alone)):
        for (_, layer), (_, full) in zip(moe_layers(ours), moe_layers(whole), strict=True):
            stacks = {name: parameter for name, parameter, _ in full.expert_parameters()}
            for name, parameter, seat_ids in layer.expert_parameters():
                for seat, expert in enumerate(seat_ids):
                    if expert is not None:
                        assert torch.equal(parameter[seat], stacks[name][expert])
                        copies += layer.placement.owner[expert] != grid.expert_rank
    export_model(model, out)
    return copies


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_copy_is_loaded_and_each_expert_exported_once(ranks, tiny, tmp_path, family):
    folder = tiny(family)
    found = ranks(2, seats_and_files, folder, family, tmp_path / "out")
    assert sum(found) > 0
    same_bits(file_tensors(tmp_path / "out"), file_tensors(folder))


def test_a_placement_for_another_selection_is_refused(tiny):
    name = "model.layers.0.mlp.experts"
    placed = from_lists([range(7)], num_experts=7, trainable=[1])
    with pytest.raises(UserError, match=r"of which \[1\] train; there are 7, of which \[2\] do"):
        load_model(tiny("qwen3_moe"), trainable={name: [2]}, placement={name: placed})
