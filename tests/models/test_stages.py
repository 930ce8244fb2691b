"""Stages: where a model is cut, and that the stages together are the model."""

from __future__ import annotations

import pytest
import torch
import transformers

from moe_dist.data.attention import model_inputs
from moe_dist.errors import UserError
from moe_dist.models.loading import load_model
from moe_dist.models.stages import TRIED, PassThrough, keep_stage, layer_cost, stage_layers
from moe_dist.parallel.grid import Grid
from tests.models.tiny import CONFIGS, batch, make_folder

NEXUS = {"num_experts": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder by family and changes of its configuration, made once."""
    made = {}

    def make(family: str, **changes):
        key = (family, *sorted(changes.items()))
        if key not in made:
            place = tmp_path_factory.mktemp(family)
            if family in CONFIGS:
                make_folder(family, place, **changes)
            else:
                base = {**CONFIGS["mixtral"], **(NEXUS if "nexus" in family else {}), **changes}
                config = transformers.AutoConfig.for_model(family, **base)
                torch.manual_seed(0)
                transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
            made[key] = place
        return made[key]

    return make


def at(stage: int, stages: int) -> Grid:
    return Grid(world=stages, rank=stage, pipeline=stages, pipeline_rank=stage)


def stage_of(place, stage: int, stages: int):
    model = load_model(place, dense=True)
    keep_stage(model, at(stage, stages))
    return model


def packed_batch() -> dict:
    ids = batch(2, 12)
    place = torch.arange(12)
    return {"input_ids": ids, "position_ids": torch.where(place < 7, place, place - 7).expand(2, -1)}


@torch.no_grad()
@pytest.mark.parametrize("family", TRIED)
@pytest.mark.parametrize("stages", [2, 4])
def test_the_stages_of_every_tried_family_compute_what_the_model_does(folder, family, stages):
    place = folder(family, num_hidden_layers=4, tie_word_embeddings=stages == 4)
    whole = load_model(place, dense=True)
    inputs = model_inputs(packed_batch(), whole.config)
    expected = whole(**inputs).logits
    names, passed = [], None
    for stage in range(stages):
        model = stage_of(place, stage, stages)
        names += [name for name, _ in model.named_parameters()]
        if passed is not None:
            inputs = {"inputs_embeds": passed, **{k: v for k, v in inputs.items() if not k.startswith("input")}}
        passed = model(**inputs).logits
        assert passed.shape == (2, 12, whole.config.vocab_size if stage == stages - 1 else 32)
    torch.testing.assert_close(passed, expected, rtol=0, atol=0)
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if stages == 4 else {}
    assert model.tied_copies == tied
    assert sorted(names) == sorted([name for name, _ in whole.named_parameters()] + list(tied))


def test_one_stage_is_the_model_untouched(folder):
    model = load_model(folder("mixtral"))
    keep_stage(model, Grid.single())
    assert not any(isinstance(module, PassThrough) for module in model.modules())
    assert not hasattr(model, "tied_copies")


def skeleton(family: str, **changes):
    config = transformers.AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_a_layer_costs_the_matrices_that_a_token_meets(folder):
    model = load_model(folder("mixtral"))
    attention = 32 * (32 + 16 + 16 + 32)  # 4 heads and 2 of keys and values, of 8 each
    assert layer_cost(model.model.layers[0], 2) == attention + 5 * 32 + 2 * 3 * 32 * 40
    dense = load_model(folder("deepseek_v2")).model.layers[0]
    assert layer_cost(dense, 2) == sum(p.numel() for p in dense.parameters() if p.dim() > 1)


def test_the_slowest_stage_is_as_fast_as_can_be(folder):
    """Against all cuts; and where several are equally slow the most even one is taken."""
    place = folder("deepseek_v2", num_hidden_layers=6, first_k_dense_replace=3, intermediate_size=16)
    model = load_model(place)
    costs = [layer_cost(layer, 2) for layer in model.model.layers]
    costs[0] += 32
    costs[-1] += model.lm_head.weight.numel()
    for stages in range(1, 7):
        ranges = stage_layers(model, stages)
        assert [index for span in ranges for index in span] == list(range(6))
        assert all(len(span) for span in ranges)
        found = sorted((sum(costs[i] for i in span) for span in ranges), reverse=True)
        best = min(
            (
                sorted((sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, 6), strict=True)), reverse=True)
                for cuts in _cuts(stages - 1, 1)
            ),
            key=lambda sums: (sums[0], sum(value**2 for value in sums)),
        )
        assert found == best
    assert [len(span) for span in stage_layers(model, 2)] == [
        4,
        2,
    ]  # three dense layers weigh less than three with experts


def _cuts(number: int, first: int):
    if number == 0:
        yield ()
        return
    for cut in range(first, 6):
        for rest in _cuts(number - 1, cut + 1):
            yield (cut, *rest)


def test_more_stages_than_layers_are_refused(folder):
    with pytest.raises(UserError, match=r"has 2 layers.*at most 2"):
        stage_of(folder("mixtral"), 0, 3)


def test_families_that_were_not_tried_are_refused():
    config = transformers.AutoConfig.for_model("gemma", num_hidden_layers=2, hidden_size=32, vocab_size=96)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"GemmaForCausalLM was not tried in stages.*mixtral"):
        keep_stage(model, at(0, 2))
