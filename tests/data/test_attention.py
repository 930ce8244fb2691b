"""Packed documents do not see each other: perturbing one leaves the others' logits as they are, to the bit, and no
gradient crosses. Negative controls show that each part of the call is needed."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_dist.data.attention import OWN_MASKS, check_packing, model_inputs
from moe_dist.data.packing import assemble, collate
from moe_dist.errors import UserError

LATENT = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_key_value_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_shared_experts": 1,
}  # fmt: skip
FAMILIES = {
    "qwen3_moe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "mixtral": {"sliding_window": None},
    "mixtral-sliding": {"sliding_window": 3},
    "olmoe": {"eos_token_id": 1},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gpt_oss": {"sliding_window": 3},
    "afmoe": {"sliding_window": 3, "global_attn_every_n_layers": 2, "num_dense_layers": 0},
}
CASES = [
    (name, attention)
    for name in FAMILIES
    for attention in ("eager", "sdpa")
    if (name, attention) != ("gpt_oss", "sdpa")  # its attention sinks have no sdpa form
]
# Rows of documents by length; the rest of the 16 tokens is padding.
ROWS = [[5, 7], [1, 11, 2], [16]]
VICTIM = slice(5, 12)  # the second document of the first row


def build(name: str, attention: str):
    torch.manual_seed(0)
    # Every token goes to every expert, so that no expert's batch changes shape when another document changes.
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 4, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(name.split("-")[0], **{**settings, **FAMILIES[name]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.set_experts_implementation("eager")
    return model


def packed_batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for lengths in ROWS:
        documents = [torch.randint(1, 64, (length,), generator=generator).numpy() for length in lengths]
        rows.append(assemble([(ids, ids > 0) for ids in documents], 16, pad_id=0))
    return collate(rows)


def perturbed(batch: dict, columns: slice) -> dict:
    ids = batch["input_ids"].clone()
    ids[0, columns] = (ids[0, columns] + 7) % 64
    return {**batch, "input_ids": ids}


@torch.no_grad()
def logits(model, batch, **changes):
    return model(**{**model_inputs(batch, model.config), **changes}).logits


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_documents_of_a_row_are_strangers(name, attention):
    model = build(name, attention)
    check_packing(model.config)
    batch = packed_batch()
    plain = logits(model, batch)
    assert torch.isfinite(plain).all()
    for columns in (slice(0, 5), slice(12, 16)):  # the document before, the padding behind
        other = logits(model, perturbed(batch, columns))
        assert not torch.equal(other[0, columns], plain[0, columns])
        assert torch.equal(other[0, VICTIM], plain[0, VICTIM])
        assert torch.equal(other[1:], plain[1:])

    alone = {"input_ids": batch["input_ids"][:1, VICTIM], "position_ids": batch["position_ids"][:1, VICTIM]}
    assert torch.allclose(logits(model, alone)[0], plain[0, VICTIM], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_no_gradient_crosses(name, attention):
    model = build(name, attention)
    batch = packed_batch()
    inputs = model_inputs(batch, model.config)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=embedded, **inputs).logits[0, VICTIM].square().sum().backward()
    reached = embedded.grad.abs().amax(-1) > 0
    assert reached[0, VICTIM].all()
    assert not reached[0, :5].any()
    assert not reached[0, 12:].any()
    assert not reached[1:].any()


@pytest.mark.parametrize("change", ["cache", "mask", "positions"])
def test_each_part_of_the_call_is_needed(change):
    model = build("qwen3_moe", "sdpa")
    batch = packed_batch()
    changes = {
        "cache": {"use_cache": True},
        "mask": {"attention_mask": batch["attention_mask"]},
        "positions": {"position_ids": torch.arange(16)[None]},
    }[change]
    plain, other = (logits(model, b, **changes) for b in (batch, perturbed(batch, slice(0, 5))))
    assert (plain[0, VICTIM] - other[0, VICTIM]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gpt_oss", "afmoe"])
def test_families_with_own_masks_need_them(name):
    model = build(name, "eager")
    batch = packed_batch()
    plain, other = (logits(model, b, attention_mask=None) for b in (batch, perturbed(batch, slice(0, 5))))
    assert (plain[0, VICTIM] - other[0, VICTIM]).abs().max() > 1e-3


def makes_masks_without_positions(source: str) -> bool:
    """Whether a modeling file builds a causal mask from arguments that lack position_ids."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "mask_kwargs":
            names = {getattr(key, "value", None) for key in getattr(node.value, "keys", ())}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "create_causal_mask",
            "create_sliding_window_causal_mask",
        ):
            names = {keyword.arg for keyword in node.keywords}
            if None in names:  # **mask_kwargs, judged where it is made
                continue
        else:
            continue
        if "inputs_embeds" in names and "position_ids" not in names:
            return True
    return False


def test_no_installed_family_makes_masks_of_its_own_unknown_to_us():
    models = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    found = set()
    for path in models.glob("*/modeling_*.py"):
        source = path.read_text("utf-8")
        if "use_experts_implementation" in source and makes_masks_without_positions(source):
            found.add(path.parent.name)
    # the mask of deepseek_ocr2 is that of its image encoder
    assert "gpt_oss" in found
    assert found - {"deepseek_ocr2"} <= set(OWN_MASKS)


def test_models_that_would_mix_documents_are_refused():
    model = build("qwen3_moe", "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"flash_attention_2.*packing=false"):
        check_packing(model.config)
    for model_type in ("qwen3_next", "granitemoehybrid"):
        config = AutoConfig.for_model(model_type)
        config._attn_implementation = "sdpa"
        with pytest.raises(UserError, match=rf"{model_type} has layers of kind .*packing=false"):
            check_packing(config)
