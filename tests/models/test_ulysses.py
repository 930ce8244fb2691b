"""Models over the sequence axis: logits and every gradient against one process of transformers."""

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.nn import functional as F

from moe_dist.data import attention
from moe_dist.data.packing import assemble, collate
from moe_dist.errors import UserError
from moe_dist.models import load_model
from moe_dist.models.recompute import enable_recompute
from moe_dist.models.ulysses import TRIED, spread_attention
from moe_dist.parallel.grid import Grid, build_grid, layout
from moe_dist.parallel.traffic import count_traffic
from moe_dist.train.losses import next_labels
from moe_dist.train.rows import model_inputs, rank_rows
from tests.methods.nexus.tiny import dense_folder, nexus_folder
from tests.models.tiny import CONFIGS, VOCAB, make_folder
from tests.reference import relative_error

LENGTH = 24
LIMIT = 2e-6
FAMILIES = {
    **{name: {} for name in CONFIGS},
    "mixtral": {"sliding_window": 5},
    "gpt_oss": {"sliding_window": 5},
}
ATTENTION = {"gpt_oss": "eager"}  # its attention sinks have no sdpa form


def batch(packed: bool) -> dict[str, torch.Tensor]:
    """Two rows; packed ones hold documents that begin and end anywhere, and padding at the end of one."""
    generator, rows = torch.Generator().manual_seed(5), []
    for lengths in ([7, 11, 6], [3, 18]) if packed else ([LENGTH], [LENGTH]):
        documents = [torch.randint(3, VOCAB, (length,), generator=generator).numpy() for length in lengths]
        rows.append(assemble([(ids, ids > 20) for ids in documents], LENGTH, pad_id=0))
    return collate(rows)


def made(family: str, changes: dict, folder) -> str:
    if family in CONFIGS:
        return str(make_folder(family, folder, **FAMILIES[family], **changes))
    dense = family.removeprefix("nexus_")
    # The other routers have a temperature, whose gradient is one number: a sum that mostly cancels.
    return str(dense_folder(dense, folder) if family == dense else nexus_folder(dense, folder, router="linear"))


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 20


def prepared(folder: str, implementation: str, grid: Grid):
    model = load_model(folder, grid, dense=True)
    model.set_attn_implementation(implementation)
    return model.train()


def on_a_rank(folder: str, implementation: str, sequence: int, packed: bool, recompute: bool = False) -> dict:
    grid = build_grid(sequence=sequence)
    model = prepared(folder, implementation, grid)
    attention.check_packing(model.config)
    if recompute:
        enable_recompute(model)
    rows = rank_rows(batch(packed), grid)
    with count_traffic() as traffic:
        logits = model(**model_inputs(rows, model.config)).logits
        forward = traffic.bytes("sequence")
        loss_of(logits, rows.targets_BM).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=grid.sequence_group)
            gradients[name] = parameter.grad.numpy()
    return {
        "logits": logits.detach().numpy(),
        "gradients": gradients,
        "config": model.config.to_json_string(),
        "bytes": (forward, traffic.bytes("sequence") - forward),
    }


def in_one_process(folder: str, implementation: str, packed: bool) -> dict:
    model, data = prepared(folder, implementation, Grid.single()), batch(packed)
    logits = model(**attention.model_inputs(data, model.config)).logits
    loss_of(logits, next_labels(data["labels"])).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation)
        theirs = plain(**attention.model_inputs(data, plain.config)).logits
    assert relative_error(logits.detach(), theirs) < LIMIT
    return {"logits": theirs, "gradients": gradients, "config": model.config.to_json_string()}


def compare(ranks, folder: str, implementation: str, sequence: int, packed: bool, **options) -> tuple[int, int]:
    """Returns the bytes that the first rank sent over the sequence axis in its forward and in its backward."""
    results = ranks(sequence, on_a_rank, folder, implementation, sequence, packed, *options.values())
    expected = in_one_process(folder, implementation, packed)
    logits = torch.cat([torch.from_numpy(result["logits"]) for result in results], dim=1)
    assert relative_error(logits, expected["logits"]) < LIMIT
    for result in results:
        assert result["config"] == expected["config"]
        assert set(result["gradients"]) == set(expected["gradients"])
    errors = {
        name: relative_error(torch.from_numpy(results[0]["gradients"][name]), gradient)
        for name, gradient in expected["gradients"].items()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] < LIMIT, f"{worst}: {errors[worst]:.1e}"
    return results[0]["bytes"]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", TRIED)
def test_two_ranks_compute_what_one_process_does(ranks, tmp_path, family, packed):
    compare(ranks, made(family, {}, tmp_path), ATTENTION.get(family, "sdpa"), 2, packed)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_eager_attention(ranks, tmp_path, family):
    compare(ranks, made(family, {}, tmp_path), "eager", 2, packed=True)


@pytest.mark.parametrize(
    ("family", "heads", "keys"),
    [("mixtral", 4, 2), ("gpt_oss", 8, 2), ("qwen3_moe", 4, 1), ("qwen3_moe", 12, 6), ("deepseek_v2", 4, 4)],
)
def test_four_ranks_with_fewer_key_heads_and_with_numbers_that_do_not_divide(ranks, tmp_path, family, heads, keys):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": keys}
    if family == "mixtral":
        sizes["head_dim"] = 8
    compare(ranks, made(family, sizes, tmp_path), ATTENTION.get(family, "sdpa"), 4, packed=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_bytes_and_recomputation(ranks, tmp_path, recompute):
    """4 query heads and 2 of keys and values, of 8 numbers; half of what a rank has goes to the other one."""
    sent = compare(ranks, made("mixtral", {}, tmp_path), "sdpa", 2, packed=True, recompute=recompute)
    layers, tokens = 2, 2 * LENGTH // 2
    once = 4 * layers * tokens * (4 + 2 + 2 + 4) * 8 // 2
    assert sent == (once, 2 * once if recompute else once)


def skeleton(family: str, **changes):
    config = transformers.AutoConfig.for_model(family, **{**CONFIGS.get(family, CONFIGS["mixtral"]), **changes})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"sequence": 3}, r"parallel\.sequence=3 does not divide the 4 attention heads.*1, 2, 4"),
        ({"sequence": 8}, r"parallel\.sequence=8 does not divide the 4"),
        ({"sequence": 4, "tensor": 2}, r"4 does not divide the 2 attention heads on each of 2 tensor ranks.*1, 2$"),
    ],
)
def test_heads_that_cannot_be_dealt_out_are_refused_before_anything_is_loaded(axes, said):
    world = axes["sequence"] * axes.get("tensor", 1)
    with pytest.raises(UserError, match=said):
        spread_attention(skeleton("qwen3_moe"), layout(world, **axes))


def test_what_would_be_wrong_is_refused():
    grid = layout(2, sequence=2)
    with pytest.raises(UserError, match="granitemoehybrid has not been tried over the sequence axis"):
        spread_attention(skeleton("granitemoehybrid", num_hidden_layers=1, mamba_n_heads=8, mamba_d_head=8), grid)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UserError, match="type dynamic depend on the longest row"):
        spread_attention(skeleton("qwen3_moe", rope_parameters=rope), grid)
    model = skeleton("qwen3_moe")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match=r"flex_attention: not available over the sequence axis; choose eager or sdpa"):
        spread_attention(model, grid)


def test_a_mixture_of_lora_experts_is_refused():
    model = skeleton("mixtral")
    model.config.mixse = {"experts": []}
    with pytest.raises(UserError, match="keeps the base model's states of whole rows"):
        spread_attention(model, layout(2, sequence=2))


def test_without_the_axis_nothing_is_touched():
    model = skeleton("mixtral")
    spread_attention(model, Grid.single())
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
