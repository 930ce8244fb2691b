"""SwiGLU's native passes against the formula in float64, at every width, alignment and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moe_dist.ops import native
from moe_dist.ops.swiglu import swiglu, swiglu_backward, swiglu_forward
from tests.reference import relative_error

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 2.5e-3}


def oracle(z, grad, factor):
    z, factor = z.double().clone().requires_grad_(), factor.double().clone().requires_grad_()
    a = swiglu(z) * factor[:, None]
    a.backward(grad.double())
    return a.detach(), z.grad, factor.grad


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 7), (5, 16), (2, 33), (130, 200)])
def test_both_passes(rows, width, dtype):
    torch.manual_seed(rows)
    z, grad = (3 * torch.randn(rows, 2 * width)).to(dtype), torch.randn(rows, width).to(dtype)
    a, dz, _ = oracle(z, grad, torch.ones(rows))
    assert relative_error(swiglu_forward(z, out=torch.empty_like(grad)), a) <= TOLERANCE[dtype]
    again, grad_z = swiglu_backward(grad, z, out=torch.empty_like(grad), out_grad=torch.empty_like(z))
    assert relative_error(again, a) <= TOLERANCE[dtype]
    assert relative_error(grad_z, dz) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 7), (5, 16), (2, 33), (130, 200)])
def test_a_factor_for_each_row(rows, width, dtype):
    """One rounding in all: of bfloat16, each element is at most half a unit in its last place off."""
    torch.manual_seed(rows)
    z, grad = (3 * torch.randn(rows, 2 * width)).to(dtype), torch.randn(rows, width).to(dtype)
    factor = torch.rand(rows)
    wants = oracle(z, grad, factor)
    a = swiglu_forward(z, factor, out=torch.empty_like(grad))
    dfactor = torch.full((rows,), float("nan"))
    places = {"out": torch.empty_like(grad), "out_grad": torch.empty_like(z), "out_factor": dfactor}
    again, grad_z = swiglu_backward(grad, z, factor, **places)
    assert torch.equal(again, a)
    for ours, want in zip((a, grad_z, dfactor), wants, strict=True):
        if dtype == torch.bfloat16 and ours is not dfactor:
            torch.testing.assert_close(ours.double(), want, rtol=2**-8, atol=1e-6)
        else:
            assert relative_error(ours, want) <= (5e-7 if ours is dfactor else TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_activation_may_overwrite_its_gradient(dtype):
    z, grad = torch.randn(9, 42).to(dtype), torch.randn(9, 21).to(dtype)
    apart = swiglu_backward(grad, z, out=torch.empty_like(grad), out_grad=torch.empty_like(z))
    place = grad.clone()
    over = swiglu_backward(place, z, out=place, out_grad=torch.empty_like(z))
    assert torch.equal(over[0], apart[0])
    assert torch.equal(over[1], apart[1])
    assert over[0] is place


def test_large_and_odd_numbers():
    gate = torch.tensor([-1e30, -500.0, -88.0, -0.0, 88.0, 500.0, 1e30])
    z = torch.stack([gate, torch.ones(7)], dim=1)
    a = swiglu_forward(z, out=torch.empty(7, 1))
    torch.testing.assert_close(a[:, 0], gate.clamp(min=0), rtol=1e-6, atol=1e-5)
    assert torch.isnan(swiglu_forward(torch.tensor([[float("nan"), 1.0]]), out=torch.empty(1, 1)))
    assert torch.isnan(swiglu_forward(torch.tensor([[1.0, float("nan")]]), out=torch.empty(1, 1)))
    bf16 = torch.tensor([[float("nan"), 1.0]], dtype=torch.bfloat16)
    assert torch.isnan(swiglu_forward(bf16, out=bf16.new_empty(1, 1)))


@pytest.mark.skipif(not native.has_cpu(), reason="the native library was not built here")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_narrower_instruction_sets(isa):
    """The choice is made once a process: another one runs this file's main tests."""
    tests = [f"{__file__}::test_both_passes", f"{__file__}::test_a_factor_for_each_row"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=os.environ | {"MOE_DIST_ISA": isa}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout
