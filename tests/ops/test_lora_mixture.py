"""A linear layer with a mixture of LoRA experts against its formula: outputs, every gradient, what is kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from moe_dist.ops import native
from moe_dist.ops.lora_mixture import choose, lora_mixture, reference
from tests.reference import relative_error

NAMES = ("x", "weight", "bias", "a", "b", "mix")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
RANKS = {"equal": (4, 4, 4), "unequal": (3, 8, 1, 5), "one": (8,), "an expert without rows": (4, 0, 2)}
needs_native = pytest.mark.skipif(not native.has_cpu(), reason="the native library was not built here")
FORMS = ["concatenated", pytest.param("chosen", marks=needs_native)]


def problem(
    ranks, *, tokens=13, hidden=24, out=40, top_k=1, dtype=torch.float64, mix_dtype=None, bias=True, trains=NAMES
):
    """The op's tensors, drawn alike for every dtype; each token has `top_k` weights, the others are zero."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = len(ranks)
    mix_TN = draw(tokens, count).softmax(dim=1)
    chosen_TK = mix_TN.topk(min(top_k, count), dim=1).indices
    mix_TN = torch.zeros_like(mix_TN).scatter(1, chosen_TK, mix_TN.gather(1, chosen_TK))
    x_TH, weight_OH, bias_O = draw(tokens, hidden), draw(out, hidden), draw(out)
    tensors = [x_TH, weight_OH, bias_O if bias else None, draw(sum(ranks), hidden), draw(sum(ranks), out), mix_TN]
    dtypes = [dtype] * 5 + [mix_dtype or dtype]
    return [
        None if tensor is None else tensor.to(wanted).requires_grad_(name in trains)
        for tensor, wanted, name in zip(tensors, dtypes, NAMES, strict=True)
    ]


FROZEN = ("x", "weight", "bias", "mix")  # what may train with the form `chosen`


def answer(function, tensors, ranks, grad_TO, **options):
    """Output and the gradients of those tensors that require one, by name."""
    wanted = {name: t for name, t in zip(NAMES, tensors, strict=True) if t is not None and t.requires_grad}
    y_TO = function(*tensors, ranks, **options)
    grads = torch.autograd.grad(y_TO, list(wanted.values()), grad_TO.to(y_TO.dtype)) if wanted else []
    return {"y": y_TO.detach(), **dict(zip(wanted, grads, strict=True))}


def oracle(tensors, ranks, grad_TO, *, most=None):
    """The formula in float64 on the very same numbers."""
    tensors = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    found = answer(reference, tensors, ranks, grad_TO.double())
    if most is not None and "mix" in found:
        found["mix"] = found["mix"] * (tensors[5] != 0)
    return found


def gradient(tensors):
    generator = torch.Generator().manual_seed(6)
    return torch.randn(len(tensors[0]), len(tensors[1]), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("top_k", [1, 2, 9])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_output_and_gradients(ranks, top_k, bias, dtype):
    tensors = problem(ranks, top_k=top_k, bias=bias, dtype=dtype)
    got = answer(lora_mixture, tensors, ranks, gradient(tensors))
    for name, expected in oracle(tensors, ranks, gradient(tensors)).items():
        assert relative_error(got[name], expected) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 3, 150])
@pytest.mark.parametrize(("hidden", "out"), [(24, 40), (64, 33), (2050, 300), (7, 17)])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_both_forms_with_frozen_experts(ranks, top_k, hidden, out, tokens, form):
    sizes = {"tokens": tokens, "hidden": hidden, "out": out}
    tensors = problem(ranks, top_k=top_k, dtype=torch.float32, trains=FROZEN, **sizes)
    got = answer(lora_mixture, tensors, ranks, gradient(tensors), most=top_k, form=form)
    expected = oracle(tensors, ranks, gradient(tensors), most=top_k)
    if tokens < 100:  # the few numbers of this gradient may each be next to nothing beside the terms of their sums
        without_signs = [t.detach().abs().requires_grad_(t.requires_grad) for t in tensors]
        terms = oracle(without_signs, ranks, gradient(tensors).abs(), most=top_k)["mix"]
        assert (got.pop("mix") - expected.pop("mix")).norm() <= 5e-7 * terms.norm()
    for name in expected:
        assert relative_error(got[name], expected[name]) <= TOLERANCE[torch.float32], name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_bf16_is_as_near_as_plain_torch(top_k, form):
    """With float32 weights of the mixture; both against float64 on the very same numbers."""
    ranks, dtypes = (8, 7, 8), {"dtype": torch.bfloat16, "mix_dtype": torch.float32}
    trains = NAMES if form == "concatenated" else FROZEN
    tensors = problem(ranks, tokens=64, hidden=256, out=97, top_k=top_k, trains=trains, **dtypes)
    grad_TO = gradient(tensors).bfloat16()
    expected = oracle(tensors, ranks, grad_TO)
    plain, ours = answer(reference, tensors, ranks, grad_TO), answer(lora_mixture, tensors, ranks, grad_TO, form=form)
    if form == "chosen":
        for found in (expected, plain):
            found["mix"] = found["mix"] * (tensors[5] != 0)
    for name in expected:
        assert ours[name].dtype == plain[name].dtype
        assert relative_error(ours[name], expected[name]) <= 1.3 * relative_error(plain[name], expected[name]), name


@pytest.mark.parametrize("trains", [(), ("mix",), ("x",), ("a",), ("b",), ("x", "mix"), ("a", "b"), ("weight", "bias")])
def test_any_tensors_may_be_frozen(trains):
    ranks = (4, 4)
    tensors = problem(ranks, trains=trains)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y_TO = lora_mixture(*tensors, ranks)
    got = answer(lora_mixture, tensors, ranks, gradient(tensors))
    for name, expected in oracle(tensors, ranks, gradient(tensors)).items():
        assert relative_error(got[name], expected) <= 1e-12, name
    assert y_TO.requires_grad == bool(trains)
    held = any(t.data_ptr() == tensors[0].data_ptr() for t in kept)
    assert held == bool({"a", "weight"} & set(trains)), "the input is kept for the gradients of A and W alone"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tokens", [1, 5, 700])
def test_without_b_it_is_the_base_layer_to_the_bit(tokens, bias, dtype, form):
    ranks = (8,) * 4
    x, weight, bias_O, a, b, mix = problem(ranks, tokens=tokens, hidden=96, out=1024, bias=bias, dtype=dtype, trains=())
    got = lora_mixture(x, weight, bias_O, a, torch.zeros_like(b), mix, ranks, form=form)
    assert torch.equal(got, F.linear(x, weight, bias_O))


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    ranks = (4, 4)
    tensors = problem(ranks, tokens=0, dtype=torch.float32, trains=FROZEN)
    got = answer(lora_mixture, tensors, ranks, gradient(tensors), form=form)
    assert got["y"].shape == (0, 40)
    assert got["x"].shape == (0, 24)
    assert got["mix"].shape == (0, 2)
    assert not got["weight"].any()


@pytest.mark.parametrize("form", FORMS)
def test_no_expert_chosen(form):
    ranks = (4, 4)
    tensors = problem(ranks, dtype=torch.float32, trains=FROZEN)
    tensors[5] = torch.zeros_like(tensors[5]).requires_grad_()
    x, weight, bias = tensors[:3]
    got = answer(lora_mixture, tensors, ranks, gradient(tensors), most=1, form=form)
    assert torch.equal(got["y"], F.linear(x, weight, bias))
    assert torch.equal(got["x"], gradient(tensors).float() @ weight)
    assert not got["mix"].any()


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_a_token_do_not_reach_another(form):
    ranks = (4, 4)
    *tensors, mix = problem(ranks, dtype=torch.float32, trains=())
    other = mix.clone()
    other[3] = 2.0
    before, after = (lora_mixture(*tensors, weights, ranks, form=form) for weights in (mix, other))
    assert (before != after).any(dim=1).nonzero().flatten().tolist() == [3]


@needs_native
def test_threads_change_no_bit():
    ranks, before, results = (8, 3, 8, 8), torch.get_num_threads(), []
    tensors = problem(ranks, tokens=400, hidden=500, out=700, top_k=2, dtype=torch.float32, trains=FROZEN)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y_TO, dx_TH, dmix_TN = torch.zeros(400, 700), torch.zeros(400, 500), torch.zeros(400, 4)
            x, _, _, a, b, mix = (t.detach() for t in tensors)
            starts = torch.tensor([0, 8, 11, 19, 27])
            u = torch.ops.moe_dist.lora_forward(x, a, b, mix, starts, y_TO)
            torch.ops.moe_dist.lora_backward(gradient(tensors).float(), a, b, mix, starts, u, dx_TH, dmix_TN)
            results.append([y_TO, dx_TH, dmix_TN])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@needs_native
def test_what_is_not_a_number_stays_in_its_row():
    ranks = (4, 4)
    x, weight, bias, a, b, mix = problem(ranks, dtype=torch.float32, trains=())
    mix[2, 1] = float("nan")
    y_TO = lora_mixture(x, weight, bias, a, b, mix, ranks, form="chosen")
    assert y_TO.isnan().any(dim=1).nonzero().flatten().tolist() == [2]
    assert y_TO[2].isnan().all()


def chosen(experts, *, tokens=4096, most=1, rank=8, dtype=torch.float32, trains=False):
    sizes = ((tokens, 2048), (experts * rank, 2048), (experts * rank, 2048))
    x_TH, a_RH, b_RH = (torch.empty(size, dtype=dtype) for size in sizes)
    return choose(x_TH, a_RH, b_RH, (rank,) * experts, most, trains=trains) == "chosen"


@needs_native
def test_the_choice():
    """The ends of the scale, as measured; in between both forms take about the same time."""
    assert all(chosen(experts) for experts in (4, 16, 64))
    assert chosen(64, dtype=torch.bfloat16)
    assert not chosen(4, dtype=torch.bfloat16)
    assert all(
        chosen(4, tokens=tokens, dtype=dtype) for tokens in (0, 1, 8) for dtype in (torch.float32, torch.bfloat16)
    )
    assert not chosen(4, rank=64, dtype=torch.bfloat16)
    assert not chosen(4, most=2)
    assert not chosen(64, most=64)
    # and where it does not serve
    assert not chosen(64, most=None)
    assert not chosen(64, trains=True)
    assert not chosen(64, dtype=torch.float64)


@needs_native
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_narrower_instruction_sets(isa):
    """The choice is made once a process: another one runs the tests of the native form."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "both_forms or bf16"]
    done = subprocess.run(command, env=os.environ | {"MOE_DIST_ISA": isa}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout
