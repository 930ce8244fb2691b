"""A linear layer with a mixture of LoRA experts against its formula: outputs, every gradient, what is kept."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_dist.ops.lora_mixture import lora_mixture, reference
from tests.reference import relative_error

NAMES = ("x", "weight", "bias", "a", "b", "mix")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
RANKS = {"equal": (4, 4, 4), "unequal": (3, 8, 1, 5), "one": (8,), "an expert without rows": (4, 0, 2)}


def problem(ranks, *, tokens=13, hidden=24, out=40, top_k=1, dtype=torch.float64, mix_dtype=None, bias=True):
    """The op's tensors, drawn alike for every dtype; each token has `top_k` weights, the others are zero."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = len(ranks)
    mix_TN = draw(tokens, count).softmax(dim=1)
    chosen_TK = mix_TN.topk(min(top_k, count), dim=1).indices
    mix_TN = torch.zeros_like(mix_TN).scatter(1, chosen_TK, mix_TN.gather(1, chosen_TK))
    tensors = [
        draw(tokens, hidden),
        draw(out, hidden),
        draw(out) if bias else None,
        draw(sum(ranks), hidden),
        draw(out, sum(ranks)),
        mix_TN,
    ]
    dtypes = [dtype] * 5 + [mix_dtype or dtype]
    return [None if t is None else t.to(d).requires_grad_() for t, d in zip(tensors, dtypes, strict=True)]


def answer(function, tensors, ranks, grad_TO):
    """Output and the gradients of those tensors that require one, by name."""
    wanted = {name: t for name, t in zip(NAMES, tensors, strict=True) if t is not None and t.requires_grad}
    y_TO = function(*tensors, ranks)
    grads = torch.autograd.grad(y_TO, list(wanted.values()), grad_TO.to(y_TO.dtype)) if wanted else []
    return {"y": y_TO.detach(), **dict(zip(wanted, grads, strict=True))}


def gradient(tensors):
    return torch.randn(len(tensors[0]), len(tensors[1]), generator=torch.Generator().manual_seed(6)).double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("top_k", [1, 2, 9])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_output_and_gradients(ranks, top_k, bias, dtype):
    tensors = problem(ranks, top_k=top_k, bias=bias, dtype=dtype)
    oracle = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    got = answer(lora_mixture, tensors, ranks, gradient(tensors))
    for name, expected in answer(reference, oracle, ranks, gradient(tensors)).items():
        assert relative_error(got[name], expected) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("top_k", [1, 3])
def test_bf16_is_as_near_as_plain_torch(top_k):
    """With float32 weights of the mixture; both against float64 on the very same numbers."""
    ranks = (8, 8, 8)
    tensors = problem(ranks, tokens=64, hidden=256, out=96, top_k=top_k, dtype=torch.bfloat16, mix_dtype=torch.float32)
    grad_TO = gradient(tensors).bfloat16()
    oracle = [t.detach().double().requires_grad_() for t in tensors]
    expected = answer(reference, oracle, ranks, grad_TO)
    plain, ours = answer(reference, tensors, ranks, grad_TO), answer(lora_mixture, tensors, ranks, grad_TO)
    for name in expected:
        assert ours[name].dtype == plain[name].dtype
        assert relative_error(ours[name], expected[name]) <= 1.3 * relative_error(plain[name], expected[name]), name


@pytest.mark.parametrize("trains", [(), ("mix",), ("x",), ("a",), ("b",), ("x", "mix"), ("a", "b"), ("weight", "bias")])
def test_any_tensors_may_be_frozen(trains):
    ranks = (4, 4)
    tensors = [t.requires_grad_(name in trains) for t, name in zip(problem(ranks), NAMES, strict=True)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y_TO = lora_mixture(*tensors, ranks)
    got = answer(lora_mixture, tensors, ranks, gradient(tensors))
    for name, expected in answer(reference, tensors, ranks, gradient(tensors)).items():
        assert relative_error(got[name], expected) <= 1e-12, name
    assert y_TO.requires_grad == bool(trains)
    held = any(t.data_ptr() == tensors[0].data_ptr() for t in kept)
    assert held == bool({"a", "weight"} & set(trains)), "the input is kept for the gradients of A and W alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tokens", [1, 5, 700])
def test_without_b_it_is_the_base_layer_to_the_bit(tokens, bias, dtype):
    ranks = (8,) * 4
    x, weight, bias_O, a, b, mix = problem(ranks, tokens=tokens, hidden=96, out=1024, bias=bias, dtype=dtype)
    with torch.no_grad():
        got = lora_mixture(x, weight, bias_O, a, torch.zeros_like(b), mix, ranks)
        assert torch.equal(got, F.linear(x, weight, bias_O))


def test_no_tokens():
    ranks = (4, 4)
    tensors = problem(ranks, tokens=0)
    got = answer(lora_mixture, tensors, ranks, gradient(tensors))
    assert got["y"].shape == (0, 40)
    assert got["x"].shape == (0, 24)
    assert all(not got[name].any() for name in NAMES[1:])


def test_no_expert_chosen():
    ranks = (4, 4)
    x, weight, bias, a, b, mix = problem(ranks)
    mix = torch.zeros_like(mix).requires_grad_()
    got = answer(lora_mixture, [x, weight, bias, a, b, mix], ranks, gradient([x, weight]))
    assert torch.equal(got["y"], F.linear(x, weight, bias))
    assert not got["a"].any()
    assert not got["b"].any()


def test_weights_of_a_token_do_not_reach_another():
    ranks = (4, 4)
    x, weight, bias, a, b, mix = (t.detach() for t in problem(ranks))
    other = mix.clone()
    other[3] = 2.0
    changed = lora_mixture(x, weight, bias, a, b, other, ranks) != lora_mixture(x, weight, bias, a, b, mix, ranks)
    assert changed.any(dim=1).nonzero().flatten().tolist() == [3]
