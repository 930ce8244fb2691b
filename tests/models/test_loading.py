"""Loading: what comes out equals the stock model, at any expert-parallel size."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers

from moe_dist.errors import UserError
from moe_dist.models import load_model, moe_layers
from moe_dist.parallel.grid import build_grid
from tests.models.compare import distance, pairs
from tests.models.tiny import CONFIGS, WIDTH_KEY, batch

TIGHT = 2e-6


def _stock(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def _loss(model, ids):
    """A sum over tokens, so that losses of several ranks add up."""
    logits = model(input_ids=ids).logits
    return logits, torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )


@pytest.mark.parametrize("square", [False, True], ids=["", "square"])
@pytest.mark.parametrize("family", CONFIGS)
def test_forward_and_gradients_equal_stock(tiny, family, square):
    changes = {WIDTH_KEY.get(family, "moe_intermediate_size"): 32} if square else {}
    folder = tiny(family, **changes)
    ours, stock = load_model(folder), _stock(folder)
    assert len(moe_layers(ours)) == (1 if "deepseek" in family else 2)
    for name, mine, theirs in pairs(ours, stock):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), name

    ids = batch()
    logits, loss = _loss(ours, ids)
    expected, expected_loss = _loss(stock, ids)
    assert distance(logits, expected) <= TIGHT
    loss.backward()
    expected_loss.backward()
    for name, mine, theirs in pairs(ours, stock, grad=True):
        assert distance(mine, theirs) <= TIGHT, name


def _share_of_the_gradients(folder, placement):
    """One of the ranks: its rows of the batch; the worst distance to the stock model on the whole batch."""
    import torch.distributed as dist

    grid = build_grid(expert=dist.get_world_size())
    ours, stock = load_model(folder, grid, placement=placement), _stock(folder)
    ids = batch(rows=grid.world)
    logits, loss = _loss(ours, ids[grid.rank : grid.rank + 1])
    expected, expected_loss = _loss(stock, ids)
    assert distance(logits, expected[grid.rank : grid.rank + 1]) <= TIGHT
    loss.backward()
    expected_loss.backward()
    for parameter in ours.parameters():
        if not hasattr(parameter, "is_expert"):
            dist.all_reduce(parameter.grad)
    held = 0
    for name, mine, theirs in pairs(ours, stock, grad=True):
        assert distance(mine, theirs) <= TIGHT, name
        held += "[" in name
    return held


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_each_rank_holds_its_share(ranks, tiny, family):
    held = ranks(2, _share_of_the_gradients, tiny(family), "contiguous")
    parameters = 4 if family == "gpt_oss" else 2
    layers = 2
    experts = CONFIGS[family].get("num_experts") or CONFIGS[family]["num_local_experts"]
    assert sum(held) == parameters * layers * experts


def test_any_placement(ranks, tiny):
    lists = [[6, 0, 3], [1, 5, 2, 4]]
    placement = {"model.layers.1.mlp.experts": lists}
    assert sum(ranks(2, _share_of_the_gradients, tiny("qwen3_moe"), placement)) == 2 * 2 * 7


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_bfloat16_as_stored(tiny, family):
    folder = tiny(family, dtype=torch.bfloat16)
    ours, stock = load_model(folder), _stock(folder)
    assert ours.dtype == torch.bfloat16
    for name, mine, theirs in pairs(ours, stock):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), name
    if family == "deepseek_v3":
        assert ours.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_the_files_decide_the_dtype_not_the_config(tiny, tmp_path):
    folder = shutil.copytree(tiny("mixtral"), tmp_path / "copy")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("float32", "bfloat16"))
    assert load_model(folder).dtype == torch.float32
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UserError, match="int8"):
        load_model(folder, dtype="int8")


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"shard": "20KB"}], ids=["tied", "sharded"])
def test_tied_embeddings_and_sharded_index(tiny, options):
    folder = tiny("qwen3_moe", **options)
    ours, stock = load_model(folder), _stock(folder)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == ("tie_word_embeddings" in options)
    assert ((folder / "model.safetensors.index.json").exists()) == ("shard" in options)
    ids = batch()
    assert distance(ours(input_ids=ids).logits, stock(input_ids=ids).logits) <= TIGHT


def test_rotary_buffers_have_their_values(tiny):
    folder = tiny("deepseek_v2")
    ours, stock = load_model(folder), _stock(folder)
    mine, theirs = dict(ours.named_buffers()), dict(stock.named_buffers())
    assert mine.keys() == theirs.keys()
    for name, buffer in theirs.items():
        assert torch.equal(mine[name], buffer), name


def test_trainable_experts_and_padding(tiny):
    name = "model.layers.0.mlp.experts"
    model = load_model(tiny("qwen3_moe"), trainable={name: [5, 2]})
    first, second = (layer for _, layer in moe_layers(model))
    assert first.trainable.seat_ids == (2, 5)
    assert first.frozen.seat_ids == (0, 1, 3, 4, 6)
    assert second.trainable is None
    assert not any(parameter.requires_grad for parameter in second.parameters())
    with pytest.raises(UserError, match=r"no MoE layer 'model\.layers\.9"):
        load_model(tiny("qwen3_moe"), trainable={"model.layers.9.mlp.experts": [0]})


def _pad_seats(folder):
    grid = build_grid(expert=2)
    model = load_model(folder, grid, trainable={"model.layers.0.mlp.experts": [0]})
    found = []
    for _, layer in moe_layers(model):
        for _, parameter, seat_ids in layer.expert_parameters():
            found += [parameter[seat].abs().max().item() for seat, expert in enumerate(seat_ids) if expert is None]
    return found


def test_pad_seats_are_zero(ranks, tiny):
    first, second = ranks(2, _pad_seats, tiny("qwen3_moe"))
    assert first + second
    assert not any(first + second)
