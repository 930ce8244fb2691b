"""Models cut over the tensor axis against one process of transformers: outputs, gradients, bytes, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import transformers

from moe_dist.config.schema import LoraSection
from moe_dist.errors import UserError
from moe_dist.models import init_model, load_model
from moe_dist.models.lora import inject_lora
from moe_dist.models.recompute import enable_recompute
from moe_dist.models.skeleton import build_skeleton, make_config
from moe_dist.models.tensor import check_tensors, cut_tensors
from moe_dist.parallel import traffic
from moe_dist.parallel.grid import Grid, build_grid, layout
from moe_dist.parallel.shard import shard_of
from moe_dist.train.losses import IGNORE, label_loss_sum, target_loss_sum
from moe_dist.train.rows import model_inputs, rank_rows
from tests.models.compare import distance, pairs
from tests.models.tiny import _BASE, CONFIGS, VOCAB, make_folder

TIGHT = 2e-6
CASES = {
    "mixtral": ("mixtral", {"pad_token_id": 60}),  # of the second part; the others have 0
    "qwen3_moe": ("qwen3_moe", {"tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", {}),  # biases of q, k and v, a gated shared expert
    "deepseek_v2": ("deepseek_v2", {"attention_bias": True}),  # a bias of the row-parallel layer
    "deepseek_v3": ("deepseek_v3", {}),
    "gpt_oss": ("gpt_oss", {}),  # sinks, sliding windows, biases everywhere
}
LLAMA = {
    "model_type": "llama",
    **{key: CONFIGS["mixtral"][key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")},
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}


def _batch(rows=2, length=12):
    """Packed rows: two documents in each, of lengths that no cut of the row meets, and labels on some tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    ids[0, 7], ids[1, 2] = 0, 60  # padding in some models, whose embedding then has no gradient from here
    labels = ids.clone()
    labels[0, :5] = IGNORE
    positions = torch.cat([torch.arange(5), torch.arange(length - 5)]).expand(rows, -1)
    real = torch.ones_like(ids)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": real}


def _stock(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model.train()


def _summed_gradients(model, grid):
    """Each gradient is the sum over the ranks that hold a replica; all families' rule."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "is_expert"):
            group = grid.expert_data_group
        else:
            group = grid.stage_group if shard_of(parameter) is None else grid.tensor_data_group
        if group is not None:
            dist.all_reduce(parameter.grad, group=group)


def _step(model, grid, batch):
    """This rank's logits, its share of the loss and, in the model, the step's gradients."""
    mine = {key: value.chunk(grid.data)[grid.data_rank] for key, value in batch.items()}
    rows = rank_rows(mine, grid)
    logits = model(**model_inputs(rows, model.config)).logits
    loss = target_loss_sum(logits, rows.targets_BM, group=grid.tensor_group)
    loss.backward()
    return logits, loss.detach()


def _like_one_process(folder, tensor, expert, recompute=False):
    grid = build_grid(tensor=tensor, expert=expert)
    ours, stock, batch = load_model(folder, grid).train(), _stock(folder), _batch()
    for name, mine, theirs in pairs(ours, stock):
        assert torch.equal(mine, theirs), name
    assert sum(shard_of(parameter) is not None for parameter in ours.parameters()) > 4
    if recompute:
        enable_recompute(ours)
    expected = stock(**model_inputs(rank_rows(batch, Grid.single()), stock.config)).logits
    expected_loss = label_loss_sum(expected, batch["labels"])
    expected_loss.backward()

    with traffic.count_traffic() as counted:
        logits, loss = _step(ours, grid, batch)
    total = loss.clone()
    dist.all_reduce(total)
    part = expected.chunk(grid.data)[grid.data_rank].chunk(tensor, dim=-1)[grid.tensor_rank]
    assert distance(logits, part) <= TIGHT
    assert distance(total, expected_loss.detach()) <= TIGHT
    _summed_gradients(ours, grid)
    for name, mine, theirs in pairs(ours, stock, grad=True):
        assert distance(mine, theirs) <= TIGHT, name
    return {what: counted.bytes(what) for what in ("tensor gather", "tensor scatter", "vocabulary", None)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def folder(case):
        if case not in made:
            family, changes = CASES[case]
            made[case] = make_folder(family, tmp_path_factory.mktemp(case), **changes)
        return made[case]

    return folder


@pytest.mark.parametrize("expert", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_like_one_process(ranks, tiny, case, expert):
    ranks(2, _like_one_process, tiny(case), 2, expert)


def test_beside_data_and_experts_over_both(ranks, tiny):
    ranks(4, _like_one_process, tiny("mixtral"), 2, 4)
    ranks(4, _like_one_process, tiny("qwen3_moe"), 2, 2)


def test_recompute_repeats_no_exchange(ranks, tiny):
    """And the bytes are those of the blocks: a gather at each entrance, a scatter at each exit, and as many back."""
    plain = ranks(2, _like_one_process, tiny("deepseek_v2"), 2, 1)
    assert ranks(2, _like_one_process, tiny("deepseek_v2"), 2, 1, True) == plain
    slice_bytes = 2 * 6 * 32 * 4  # [B, L / 2, H] in float32
    attentions, dense_mlps, embedding, head = 2, 1, 1, 1
    blocks = attentions + dense_mlps
    for counted in plain:
        # The embedding's exit and the head's entrance have one counterpart each, in the backward.
        assert counted["tensor gather"] == (2 * blocks + embedding + head) * slice_bytes
        assert counted["tensor scatter"] == (2 * blocks + embedding + head) * slice_bytes
        assert counted["vocabulary"] == 2 * 12 * 2 * 4


def _dense_like_one_process(config):
    grid = build_grid(tensor=2)
    alone = init_model(config, dense=True).train()
    ours = init_model(config, grid, dense=True).train()
    batch = _batch()
    expected = alone(**{key: batch[key] for key in ("input_ids", "position_ids")}, use_cache=False).logits
    label_loss_sum(expected, batch["labels"]).backward()
    logits, _ = _step(ours, grid, batch)
    assert distance(logits, expected.chunk(2, dim=-1)[grid.rank]) <= TIGHT
    _summed_gradients(ours, grid)
    theirs = dict(alone.named_parameters())
    for name, parameter in ours.named_parameters():
        shard, whole = shard_of(parameter), theirs[name]
        value, grad = (whole, whole.grad) if shard is None else (shard.cut(whole), shard.cut(whole.grad))
        assert torch.equal(parameter, value), name
        assert distance(parameter.grad, grad) <= TIGHT, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"model_type": "nexus_qwen2", "num_experts": 3, "num_experts_per_tok": 2},  # whose shared expert was its MLP
    ],
)
def test_a_dense_model(ranks, changes):
    ranks(2, _dense_like_one_process, LLAMA | changes)


def _initialised(family):
    """Of every tensor that is cut, this rank's part and the whole's; the rest is equal by the experts' own test."""
    config = {"model_type": family, **CONFIGS[family]}
    ours, alone = init_model(config, build_grid(tensor=2), seed=3), init_model(config, seed=3)
    whole = dict(alone.named_parameters())
    for name, parameter in ours.named_parameters():
        shard = shard_of(parameter)
        assert torch.equal(parameter, whole[name] if shard is None else shard.cut(whole[name])), name
        assert (shard is None) == (parameter.shape == whole[name].shape), name
    assert not whole["model.embed_tokens.weight"][config["pad_token_id"]].any()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_initialises_to_the_same_values(ranks, family):
    ranks(2, _initialised, family)


def _skeleton(family, tensor, **changes):
    config = make_config({"model_type": family, **CONFIGS.get(family, _BASE), **changes}, where="test")
    model = build_skeleton(config, torch.float32)
    grid = layout(tensor, tensor=tensor)
    check_tensors(model, grid)
    cut_tensors(model, grid)
    return model


def test_skeletons_need_no_groups():
    model = _skeleton("qwen3_moe", 2, mlp_only_layers=[0, 1])
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert [list(attention.q_proj.weight.shape), list(attention.o_proj.weight.shape)] == [[16, 32], [32, 16]]
    assert [list(mlp.up_proj.weight.shape), list(mlp.down_proj.weight.shape)] == [[24, 32], [32, 24]]
    assert list(model.model.embed_tokens.weight.shape) == list(model.lm_head.weight.shape) == [48, 32]
    assert shard_of(attention.q_norm.weight) is None
    on_meta = {
        "inputs_embeds": torch.empty(1, 3, 32, device="meta"),
        "position_ids": torch.empty(1, 6, dtype=torch.int64, device="meta"),
        "attention_mask": torch.empty(1, 1, 6, 6, device="meta"),
    }
    logits = model(**on_meta, use_cache=False).logits
    assert logits.shape == (1, 6, 48)


@pytest.mark.parametrize(
    ("family", "tensor", "changes", "says"),
    [
        ("mixtral", 4, {}, "2 key and value heads.*What works for it: 1, 2$"),
        ("mixtral", 3, {}, "4 attention heads"),
        ("deepseek_v2", 4, {"intermediate_size": 50}, "50 columns of model.layers.0.mlp.*works for it: 1, 2$"),
        ("mixtral", 2, {"vocab_size": 97}, "97 tokens of the vocabulary.*works for it: 1$"),
        ("olmoe", 2, {}, "q_proj in a way that is not served here: colwise_gather_output"),
        ("minimax", 2, {"layer_types": ["linear_attention", "full_attention"]}, "not cut model.layers.0.self_attn"),
        ("deepseek_v4", 2, {}, "does not cut model.layers.0.self_attn"),  # whose layers take masks under no name
        ("nexus_gemma", 2, {"intermediate_size": 40}, "embedding .*ScaledWordEmbedding.* does more than a lookup"),
    ],
)
def test_refusals(family, tensor, changes, says):
    with pytest.raises(UserError, match=rf"parallel.tensor={tensor}.*{says}"):
        _skeleton(family, tensor, **changes)


def test_lora_is_refused():
    model = build_skeleton(make_config(dict(LLAMA), where="test"), torch.float32)
    check_tensors(model, layout(2, tensor=2))
    inject_lora(model, LoraSection(rank=2, alpha=4, targets=["q_proj"]))
    with pytest.raises(UserError, match="LoRA, alone or mixed, is added to whole linear layers"):
        check_tensors(model, layout(2, tensor=2))


def test_a_family_s_plan_is_read_from_transformers():
    """Every layer that the plan of Mixtral's class cuts is cut, and none else."""
    model = _skeleton("mixtral", 2)
    cut = {name for name, parameter in model.named_parameters() if shard_of(parameter) is not None}
    attention = {f"model.layers.{i}.self_attn.{name}_proj.weight" for i in range(2) for name in "qkvo"}
    assert cut == attention | {"model.embed_tokens.weight", "lm_head.weight"}
    dims = {name: shard_of(parameter).dim for name, parameter in model.named_parameters() if name in cut}
    assert {name for name, dim in dims.items() if dim == 1} == {name for name in cut if "o_proj" in name}
