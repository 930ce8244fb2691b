"""Rows cut over slices: nothing is lost, targets are moved before the cut, masks are those of whole rows."""

import pytest
import torch
from transformers import AutoConfig

from moe_dist.data import attention
from moe_dist.parallel.grid import Grid, layout
from moe_dist.train.losses import IGNORE, next_labels
from moe_dist.train.rows import model_inputs, rank_rows
from tests.data.test_attention import build, packed_batch
from tests.models.tiny import CONFIGS

NEGATIVE = torch.finfo(torch.float32).min


def every_rank(batch: dict, **axes) -> list:
    world = 2 * axes.get("sequence", 1) * axes.get("tensor", 1)
    grids = [layout(world, rank, **axes) for rank in range(world)]
    return [(grid, rank_rows(batch, grid)) for grid in grids if grid.data_rank == 0]


def test_one_rank_sees_the_batch_itself():
    batch = packed_batch()
    rows = rank_rows(batch, Grid.single())
    assert not rows.are_cut
    assert rows.batch is batch
    for name in ("input_ids", "position_ids"):
        assert getattr(rows, f"{name}_BM").data_ptr() == batch[name].data_ptr()
    assert torch.equal(rows.targets_BM, next_labels(batch["labels"]))
    assert torch.equal(rows.real_BS, batch["attention_mask"].bool())
    config = AutoConfig.for_model("qwen3_moe", **CONFIGS["qwen3_moe"])
    inputs = model_inputs(rows, config)
    assert inputs == attention.model_inputs(batch, config)
    assert inputs["attention_mask"] is None


@pytest.mark.parametrize("axes", [{"sequence": 2}, {"tensor": 2}, {"sequence": 4}, {"sequence": 2, "tensor": 4}])
def test_the_parts_are_the_rows(axes):
    batch = packed_batch()
    ranks = every_rank(batch, **axes)
    first_of_blocks = [rows for grid, rows in ranks if grid.tensor_rank == 0]
    assert torch.equal(torch.cat([rows.input_ids_BM for rows in first_of_blocks], dim=1), batch["input_ids"])
    assert torch.equal(torch.cat([rows.position_ids_BM for rows in first_of_blocks], dim=1), batch["position_ids"])
    assert torch.equal(torch.cat([rows.targets_BM for rows in first_of_blocks], dim=1), next_labels(batch["labels"]))
    assert torch.equal(torch.cat([rows.real_BS for _, rows in ranks], dim=1), batch["attention_mask"].bool())
    for grid, rows in ranks:
        assert rows.are_cut
        assert torch.equal(rows.input_ids_BM, first_of_blocks[grid.sequence_rank].input_ids_BM)


def test_the_last_token_of_a_block_predicts_the_first_of_the_next():
    labels = torch.tensor([[1, 2, 3, 4]])
    batch = {"input_ids": labels, "labels": labels, "position_ids": torch.arange(4)[None]}
    batch["attention_mask"] = torch.ones_like(labels)
    (_, left), (_, right) = every_rank(batch, sequence=2)
    assert left.targets_BM.tolist() == [[2, 3]]
    assert right.targets_BM.tolist() == [[4, IGNORE]]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_mask_of_cut_rows_is_that_of_whole_ones(implementation, packed):
    """Written here by its definition: a token sees those before it in its document, and itself."""
    batch = packed_batch()
    if not packed:
        batch["position_ids"] = torch.arange(16).repeat(3, 1)
    config = AutoConfig.for_model("qwen3_moe", **CONFIGS["qwen3_moe"])
    config._attn_implementation = implementation
    document_BL = (batch["position_ids"] == 0).cumsum(1)
    expected = (document_BL[:, :, None] == document_BL[:, None, :]) & torch.ones(16, 16).tril().bool()
    for _, rows in every_rank(batch, sequence=2):
        mask = model_inputs(rows, config)["attention_mask"]
        if implementation == "sdpa" and not packed:
            assert mask is None  # plain causal attention, for which it has a faster way
            continue
        assert torch.equal(mask[:, 0] if implementation == "sdpa" else mask[:, 0] == 0, expected)
        if implementation == "eager":
            assert torch.equal(mask[:, 0][~expected].unique(), torch.tensor([NEGATIVE]))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("mixtral", "sdpa"), ("mixtral-sliding", "sdpa"), ("qwen2_moe", "eager"), ("gpt_oss", "eager"), ("afmoe", "sdpa")],
)
@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_a_model_computes_with_ready_masks_what_it_does_with_its_own(name, implementation, packed):
    model, batch = build(name, implementation), packed_batch()
    if not packed:
        batch["position_ids"] = torch.arange(16).repeat(3, 1)
    plain = model(**attention.model_inputs(batch, model.config)).logits
    ready = attention.ready_masks(batch["position_ids"], model.config)
    inputs = {**attention.model_inputs(batch, model.config), "attention_mask": ready}
    torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=1e-6)
