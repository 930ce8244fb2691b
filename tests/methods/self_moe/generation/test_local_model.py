"""The local model writes what plain transformers writes, whatever else is in the batch and in the folder."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.backend import Sampling
from moe_dist.methods.self_moe.generation.local_model import LocalModel
from tests.methods.self_moe.tiny_base import example
from tests.models.tiny import make_folder

CPU = torch.device("cpu")
GREEDY = Sampling(0.0, 1.0, 24)


def prompts_of(count: int) -> list[str]:
    """Prompts of different lengths."""
    draw = random.Random(3)
    pairs = [[example("twice", draw) for _ in range(number + 2)] for number in range(count)]
    return ["\n\n".join(["Answers", *[f"Q {i}\nA {o}" for i, o in rows[1:]], f"Q {rows[0][0]}\nA"]) for rows in pairs]


@pytest.fixture(scope="module")
def local(base):
    return LocalModel(base, device=CPU)


@pytest.fixture(scope="module")
def plain(base):
    return AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)


def test_greedy_texts_are_those_of_plain_generate_one_by_one(local, plain):
    model, tokenizer = plain
    prompts, counted = prompts_of(5), []
    found = local.complete(prompts, GREEDY, seed=0, on_tokens=counted.append)
    for prompt, mine in zip(prompts, found, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=24, do_sample=False
        )[0, inputs["input_ids"].shape[1] :].tolist()
        assert mine.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert mine.tokens == len(ids)
        assert mine.finished == (ids[-1] == tokenizer.eos_token_id)
    assert sum(counted) == sum(text.tokens for text in found)


def test_a_stop_string_ends_a_row_and_is_no_part_of_it(local):
    prompts = prompts_of(5)
    whole = local.complete(prompts, GREEDY, seed=0)
    cut = local.complete(prompts, Sampling(0.0, 1.0, 24, ("\nQ",)), seed=0)
    assert any(text.finished for text in cut)
    for before, after in zip(whole, cut, strict=True):
        at = before.text.find("\nQ")
        assert after.text == (before.text[:at] if at >= 0 else before.text)
        assert after.finished == (at >= 0 or before.finished)
        assert at < 0 or after.tokens == at + 2  # a token is a character


def test_sampling_is_plain_top_p_with_the_seed(local, plain):
    model, tokenizer = plain
    prompt, sampling = "Tasks 8\n1. do echo abc\n2. do echo hhh\n3. do echo gfe\n4.", Sampling(1.0, 0.98, 64)
    state = torch.random.get_rng_state()
    found = local.complete([prompt] * 4, sampling, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers are used up
    assert len({text.text for text in found}) == 4
    assert local.complete([prompt] * 4, sampling, seed=5) == found
    assert local.complete([prompt] * 4, sampling, seed=6) != found
    inputs = tokenizer([prompt] * 4, return_tensors="pt")
    torch.manual_seed(5)
    out_BL = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_config=GenerationConfig(
            do_sample=True, temperature=1.0, top_p=0.98, top_k=0, max_new_tokens=64, eos_token_id=2, pad_token_id=0
        ),
    )
    texts = tokenizer.batch_decode(out_BL[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.text for text in found] == texts


def test_what_a_folder_recommends_for_chats_has_no_part_in_it(local, base, tmp_path):
    shutil.copytree(base, tmp_path / "chatty")
    advice = {"do_sample": True, "top_k": 1, "repetition_penalty": 3.0, "temperature": 0.1, "eos_token_id": 2}
    (tmp_path / "chatty" / "generation_config.json").write_text(json.dumps(advice))
    chatty, prompts = LocalModel(tmp_path / "chatty", device=CPU), prompts_of(3)
    assert chatty.complete(prompts, GREEDY, seed=1) == local.complete(prompts, GREEDY, seed=1)
    sampling = Sampling(1.0, 0.98, 32)
    assert chatty.complete(prompts, sampling, seed=1) == local.complete(prompts, sampling, seed=1)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma"])
def test_other_families_and_bfloat16(family, base, tmp_path):
    """A mixture with our experts, a model without rotary positions, one with tied embeddings."""
    if family == "mixtral":
        make_folder(family, tmp_path / "model")
    else:
        from transformers import AutoConfig

        small = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}}
        sizes = small.get(family) or {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 128,
        }
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = LocalModel(tmp_path / "model", tokenizer=str(base), dtype="bfloat16", device=CPU)
    assert model.context == (64 if family == "mixtral" else 128)
    prompts = ["do echo abc", "do"]
    found = model.complete(prompts, Sampling(1.0, 0.98, 6), seed=3)
    assert [0 < text.tokens <= 6 for text in found] == [True, True]
    assert model.complete(prompts, Sampling(1.0, 0.98, 6), seed=3) == found
    assert model.count(prompts) == [11, 2]


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    make_folder("mixtral", tmp_path / "model")
    with pytest.raises(UserError, match="no tokenizer can be loaded from"):
        LocalModel(tmp_path / "model", device=CPU)


def test_an_end_mark_that_the_tokenizer_adds_is_no_part_of_a_prompt(local, base, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("do")["input_ids"][-1] == tokenizer.eos_token_id
    other = LocalModel(base, tokenizer=str(tmp_path), device=CPU)
    assert other.complete(prompts_of(2), GREEDY, seed=0) == local.complete(prompts_of(2), GREEDY, seed=0)
