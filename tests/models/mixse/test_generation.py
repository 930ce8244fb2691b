"""transformers' `generate` on a mixture: with a cache as without, and as the full forward (M7)."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from moe_dist.errors import UserError
from moe_dist.models import load_model
from moe_dist.models.mixse import experts_off
from tests.models.mixse.tiny import FAMILIES, mixse_model, mixture
from tests.models.tiny import batch
from tests.reference import relative_error

INPUTS = ("block_input", "base_last_hidden")
NEW = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(family, **options)` -> a mixture whose router tells tokens apart, made once."""
    models = {}

    def get(family: str, **options):
        key = (family, *sorted(options.items()))
        if key not in models:
            models[key] = mixse_model(family, tmp_path_factory.mktemp(family), **options)
            models[key].generation_config.eos_token_id = None
            with torch.no_grad():
                models[key].mixse_router.weight.mul_(8)
        return models[key]

    return get


def prompts() -> dict[str, torch.Tensor]:
    """Three prompts of unequal length, padded on the left."""
    ids, mask = batch(rows=3, length=9), torch.ones(3, 9, dtype=torch.long)
    for row, padding in enumerate((0, 2, 5)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    torch.manual_seed(11)
    return model.generate(**prompts(), output_logits=True, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router_input", INPUTS)
def test_cached_decoding_equals_the_full_forward(made, family, router_input):
    model = made(family, router_input=router_input, top_k=1 if family < "n" else 2)
    out = generate(model)
    mask = torch.cat([prompts()["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(out.sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for step, logits in enumerate(out.logits):
        assert relative_error(logits, whole[:, 8 + step]) < 1e-5
    assert torch.equal(whole[:, 8:-1].argmax(dim=-1), out.sequences[:, 9:])
    # The experts have a say: the base goes another way.
    with experts_off(model):
        assert not torch.equal(generate(model).sequences, out.sequences)


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.0, "top_p": 0.98},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
        {"cache_implementation": "static"},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_every_way_of_decoding_is_the_same_without_a_cache(made, router_input, options):
    model = made("llama", router_input=router_input)
    uncached = {key: value for key, value in options.items() if key != "cache_implementation"}
    assert torch.equal(generate(model, **options).sequences, generate(model, use_cache=False, **uncached).sequences)


@pytest.mark.parametrize("router_input", INPUTS)
def test_assisted_decoding_crops_both_pasts(made, router_input):
    """Candidates that are refused leave the cache again, the base's too."""
    model = made("llama", router_input=router_input)
    ids = batch(rows=1, length=6).repeat(1, 3)
    options = {"max_new_tokens": NEW, "do_sample": False}
    assisted = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(assisted, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("router_input", INPUTS)
def test_row_by_row_is_the_same_as_in_a_batch(made, router_input):
    model = made("llama", router_input=router_input)
    together = generate(model).sequences
    for row, padding in enumerate((0, 2, 5)):
        alone = model.generate(prompts()["input_ids"][row : row + 1, padding:], max_new_tokens=NEW, do_sample=False)
        assert torch.equal(alone[0], together[row, padding:])


@pytest.mark.parametrize("router_input", INPUTS)
def test_a_cache_that_the_model_makes_itself_and_one_that_is_copied(made, router_input):
    """A loop by hand; a prompt's cache is copied, and both copies go on by themselves."""
    model, ids = made("llama", router_input=router_input), batch(rows=2, length=10)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        prompt = model(ids[:, :6])
        kept = copy.deepcopy(prompt.past_key_values)
        for cache in (prompt.past_key_values, kept):
            rest = model(ids[:, 6:], past_key_values=cache)
            assert relative_error(rest.logits, whole[:, 6:]) < 1e-5


def test_a_cache_of_another_past_is_refused(made):
    model = made("llama", router_input="base_last_hidden")
    ids = batch()
    with torch.no_grad():
        with experts_off(model):
            foreign = model(ids).past_key_values
        with pytest.raises(UserError, match="begin with an empty cache"):
            model(ids, past_key_values=foreign)
        own = model(ids).past_key_values
        with experts_off(model):
            model(ids, past_key_values=own)
        with pytest.raises(UserError, match="has read 12 tokens of a cache of 24"):
            model(ids, past_key_values=own)


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("routing", ["uniform", "random"])
def test_baselines_of_routing(tmp_path, router_input, routing):
    """They mix as they say, and decode with a cache as without; random draws tell tokens, places and blocks apart."""
    folder = mixture("llama", tmp_path, router_input=router_input, routing=routing, top_k=2, seed=3)
    model = load_model(folder)
    model.generation_config.eos_token_id = None
    seen = []
    model.mixse.listeners.append(lambda block, alpha, mask: seen.append(alpha))
    ids = torch.full((2, 40), 7)
    with torch.no_grad():
        model(ids)
    assert len(seen) == (2 if router_input == "block_input" else 1)
    for alpha in seen:
        if routing == "uniform":
            assert (alpha == 1 / 3).all()
        else:
            assert ((alpha == 0.5).sum(dim=-1) == 2).all()
            assert torch.equal(alpha[0], alpha[1])
            assert (alpha[0] > 0).sum(dim=0).min() > 15  # of 40 tokens some 27 each
    if routing == "random" and len(seen) == 2:
        assert not torch.equal(seen[0], seen[1])
    model.mixse.listeners.clear()
    assert torch.equal(generate(model).sequences, generate(model, use_cache=False).sequences)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with experts_off(model), torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
