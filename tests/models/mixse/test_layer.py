"""MiXSE against its base, PEFT with one expert, and merged weights; the router's formula and its gradient."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch.nn import functional as F

from moe_dist.models import load_model
from moe_dist.models.mixse import experts_off, given_alpha
from moe_dist.models.mixse.install import mixse_layers
from tests.models.mixse.tiny import FAMILIES, LAYERS, SKILLS, mixture
from tests.models.tiny import batch
from tests.reference import relative_error


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=batch() if ids is None else ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_base_plus_one_expert(tmp_path, family):
    """M2, and that every linear layer of the blocks is mixed, its bias kept, and lm_head is not."""
    folder = mixture(family, tmp_path)
    model = load_model(folder)
    layers = dict(mixse_layers(model))
    assert sorted(layers) == sorted(f"model.layers.{i}.{part}.{name}" for i in (0, 1) for part, name in _places())
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is type(plain)
    expected = logits(plain)
    with experts_off(model):
        assert torch.equal(logits(model), expected)
    assert relative_error(logits(model), expected) > 1e-2
    for place, name in enumerate(SKILLS):
        with given_alpha(model, F.one_hot(torch.tensor(place), 3)):
            found = logits(model)
        alone = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder / "mixse" / name)
        assert relative_error(found, logits(alone)) < 2e-6
        assert relative_error(found, logits(alone.merge_and_unload())) < 1e-5


def _places():
    return [("self_attn" if name[0] in "qkvo" else "mlp", name) for name in LAYERS if name != "out"]
