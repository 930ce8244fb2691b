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
from moe_dist.models.mixse.linear import Mix, MixseLinear
from moe_dist.models.mixse.router import MixseRouter, keep_top
from moe_dist.models.mixse.spec import MixseSpec
from moe_dist.models.skeleton import build_skeleton
from moe_dist.models.surgery import swap
from moe_dist.parallel.grid import Grid
from tests.models.mixse.tiny import FAMILIES, LAYERS, SKILLS, mixse_model, mixture
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
    return [("self_attn" if name[0] in "qkvo" else "mlp", name) for name in LAYERS]


@pytest.mark.parametrize("router_input", ["block_input", "base_last_hidden"])
def test_without_b_it_is_the_base_whatever_alpha_is(tmp_path, router_input):
    """M1, to the bit."""
    folder = mixture("llama", tmp_path, zero_b=True, router_input=router_input)
    model = load_model(folder)
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert torch.equal(logits(model), expected)
    for alpha in ([1.0, 1.0, 1.0], [0.0, 7.0, -3.0], torch.randn(2, 12, 3)):
        with given_alpha(model, alpha):
            assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_layer_s_formula(dtype):
    """h = W x + b + Σ α_i s_i B_i A_i x, against float64, gradients of x and α included."""
    generator = torch.Generator().manual_seed(5)
    tokens, inner, out, ranks, scales = 7, 24, 20, (3, 5), (2.0, 0.3)
    layer = MixseLinear(torch.nn.Linear(inner, out, dtype=dtype), ranks, Mix(), "cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x_TH = torch.randn(tokens, inner, generator=generator).to(dtype).requires_grad_()
    alpha_TN = torch.rand(tokens, 2, generator=generator).requires_grad_()
    weights = torch.randn(tokens, out, generator=generator)
    layer.mix.weights_TN = alpha_TN * torch.tensor(scales)
    y = layer(x_TH.view(1, tokens, inner))[0]
    found = [y, *torch.autograd.grad((y * weights).sum(), (x_TH, alpha_TN))]

    x, alpha, w, b, a, bb = (t.detach().double() for t in (x_TH, alpha_TN, *layer.parameters()))
    x.requires_grad_(), alpha.requires_grad_()
    expected = x @ w.T + b
    for expert, (rows, scale) in enumerate(zip((slice(0, 3), slice(3, 8)), scales, strict=True)):
        expected = expected + alpha[:, expert, None] * scale * (x @ a[rows].T @ bb[rows])
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), (x, alpha))]
    for mine, right in zip(found, wanted, strict=True):
        assert relative_error(mine, right) < (2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_alpha_is_the_masked_softmax(tmp_path, k):
    """M3, on every token and block of a model, and where probabilities are equal."""
    model = mixse_model("qwen2", tmp_path, top_k=k, bias=True)
    with torch.no_grad():
        model.mixse_router.weight.mul_(4)
        model.mixse_router.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    seen = []
    model.mixse.listeners.append(lambda block, alpha, mask: seen.append(alpha))
    with torch.no_grad():
        hidden = model(input_ids=batch(), output_hidden_states=True).hidden_states
    assert len(seen) == 2
    for alpha, inputs in zip(seen, hidden, strict=False):
        scores = F.linear(inputs.double(), model.mixse_router.weight.double(), model.mixse_router.bias.double())
        softmax = scores.softmax(dim=-1)
        assert ((alpha > 0).sum(dim=-1) == k).all()
        kept = softmax.sort(dim=-1, descending=True).values[..., k - 1 : k]
        assert relative_error(alpha, torch.where(softmax >= kept, softmax, 0.0)) < 2e-6
        assert relative_error(alpha.sum(-1), softmax.topk(k).values.sum(-1)) < 2e-6
        assert (k < 3) == bool((alpha.sum(-1) < 0.999).any())
    assert ((keep_top(torch.full((5, 3), 1 / 3), k) > 0).sum(dim=-1) == k).all()


@pytest.mark.parametrize("router_input", ["block_input", "base_last_hidden"])
def test_the_router_s_gradient_lives_at_top_1(tmp_path, monkeypatch, router_input):
    """M4; where α is divided by its sum, the negative control, it is dead: α is 1 whatever the router says."""
    model = mixse_model("llama", tmp_path, router_input=router_input).double()
    ids = batch()

    def gradient() -> float:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return model.mixse_router.weight.grad.norm().item()

    alive = gradient()
    plain = MixseRouter.forward

    def renormalised(self, hidden):
        alpha = plain(self, hidden)
        return alpha / alpha.sum(dim=-1, keepdim=True)

    monkeypatch.setattr(MixseRouter, "forward", renormalised)
    assert alive > 1e-4
    assert gradient() / alive < 1e-5


def test_who_shares_which_alpha(tmp_path):
    """M6: the layers of a block share one α; with base_last_hidden all do, and it does not depend on the experts."""
    folder = mixture("llama", tmp_path, router_input="base_last_hidden")
    model = load_model(folder)
    assert len({id(layer.mix) for _, layer in mixse_layers(model)}) == 1
    seen = []
    model.mixse.listeners.append(lambda block, alpha, mask: seen.append((block, alpha)))
    logits(model)
    with torch.no_grad():
        for _, layer in mixse_layers(model):
            layer.experts_b.mul_(-3)
    logits(model)
    assert [block for block, _ in seen] == [None, None]
    assert torch.equal(seen[0][1], seen[1][1])
    hidden = transformers.AutoModel.from_pretrained(tmp_path / "base")(input_ids=batch()).last_hidden_state
    assert torch.equal(seen[0][1], model.mixse_router(hidden))

    model = mixse_model("llama", tmp_path / "blocks")
    mixes = [[id(layer.mix) for name, layer in mixse_layers(model) if f"layers.{index}." in name] for index in (0, 1)]
    assert [len(set(ids)) for ids in mixes] == [1, 1]
    assert mixes[0][0] != mixes[1][0]


def test_a_copy_of_the_model_mixes_for_itself(tmp_path):
    model = mixse_model("llama", tmp_path)
    expected = logits(model)
    model(input_ids=batch(), use_cache=False)  # leaves a graph in the mixes
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.mixse_router.weight.neg_()
    assert torch.equal(logits(twin), expected)
    assert not torch.equal(logits(model), expected)


def test_hidden_states_are_those_of_one_pass(tmp_path):
    """transformers collects them by hooks, which must not see the base's pass."""
    model = mixse_model("llama", tmp_path, router_input="base_last_hidden")
    with torch.no_grad():
        out = model(input_ids=batch(), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_share_of_parameters_at_seven_billion():
    """M9 at Gemma-7B's shape: under 0.3 % an expert of rank 8, some 1 % for four, and a router of n·H numbers."""
    config = transformers.GemmaConfig(head_dim=256)  # its defaults are the 7B model
    spec = MixseSpec(
        experts=("a", "b", "c", "d"), ranks=(8,) * 4, scales=(2.0,) * 4, targets=tuple(sorted(set(LAYERS)))
    )
    config.mixse = spec.to_dict()
    model = build_skeleton(config, torch.bfloat16)
    model.tie_weights(recompute_mapping=False)
    base = sum(parameter.numel() for parameter in model.parameters())
    swap(model, Grid.single(), device="meta")
    assert 8.4e9 < base < 8.7e9
    experts = sum(layer.experts_a.numel() + layer.experts_b.numel() for _, layer in mixse_layers(model))
    assert len(mixse_layers(model)) == 28 * 7
    assert experts / 4 < 0.003 * base
    assert 0.009 * base < experts < 0.012 * base
    assert sum(parameter.numel() for parameter in model.mixse_router.parameters()) == 4 * 3072
