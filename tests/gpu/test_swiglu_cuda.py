"""SwiGLU's CUDA kernels on a GPU: against float64, the same bits in every run, offsets beyond 32 bits."""

import pytest
import torch

from moe_dist.ops import native
from moe_dist.ops.swiglu import swiglu, swiglu_backward, swiglu_forward
from tests.ops.cases import relative_error

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
if not native.has_cuda():
    pytest.skip(native.status(), allow_module_level=True)

# fp32: a handful of roundings of 6e-8; bf16: one rounding of at most 2^-8
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 2**-8}


def draw(rows, width, dtype):
    torch.manual_seed(0)
    z_RF = (3 * torch.randn(rows, 2 * width, device="cuda")).to(dtype)
    return z_RF, torch.randn(rows, width, device="cuda").to(dtype), torch.rand(rows, device="cuda")


def backward(grad_RI, z_RF, factor_R):
    out, out_factor = grad_RI.clone(), torch.full((len(z_RF),), float("nan"), device="cuda")
    a_RI, dz_RF = swiglu_backward(out, z_RF, factor_R, out=out, out_grad=torch.empty_like(z_RF), out_factor=out_factor)
    return a_RI, dz_RF, out_factor


# Mixtral's, Qwen3's and DeepSeek-V2-Lite's widths; odd ones; a row of one element
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (300, 14336), (5000, 768), (999, 1408), (70, 33), (5, 1)])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_against_float64(rows, width, dtype, factored):
    z_RF, grad_RI, factor_R = draw(rows, width, dtype)
    wide_RF, wide_R = z_RF.double().requires_grad_(), factor_R.double().requires_grad_()
    if not factored:
        factor_R, wide_R = None, torch.ones_like(wide_R, requires_grad=True)
    want_RI = swiglu(wide_RF) * wide_R[:, None]
    want_dz, want_factor = torch.autograd.grad(want_RI, (wide_RF, wide_R), grad_RI.double())
    a_RI, dz_RF, dfactor_R = backward(grad_RI, z_RF, factor_R)
    for got in (swiglu_forward(z_RF, factor_R, out=torch.empty_like(grad_RI)), a_RI):
        assert relative_error(got, want_RI) < TOLERANCE[dtype]
    assert relative_error(dz_RF, want_dz) < TOLERANCE[dtype]
    assert relative_error(dfactor_R, want_factor) < 2e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_same_bits_in_every_run(dtype):
    z_RF, grad_RI, factor_R = draw(4000, 2048, dtype)
    first = backward(grad_RI, z_RF, factor_R)
    for _ in range(3):
        for a, b in zip(first, backward(grad_RI, z_RF, factor_R), strict=True):
            assert torch.equal(a, b)


def test_large_and_odd_numbers():
    for dtype in TOLERANCE:
        gate = torch.tensor([-1e30, -500.0, -88.0, -0.0, 88.0, 500.0, 1e30], device="cuda")
        z_RF = torch.stack([gate, torch.ones_like(gate)], dim=1).to(dtype)
        a_RI = swiglu_forward(z_RF, out=z_RF.new_empty(7, 1))
        torch.testing.assert_close(a_RI[:, 0], z_RF[:, 0].clamp(min=0), rtol=1e-2, atol=1e-5)
        grad_RI = torch.ones_like(a_RI)
        _, dz_RF = swiglu_backward(grad_RI, z_RF, out=torch.empty_like(a_RI), out_grad=torch.empty_like(z_RF))
        assert torch.isfinite(dz_RF).all()
        z_RF[0] = float("nan")
        assert torch.isnan(swiglu_forward(z_RF, out=z_RF.new_empty(7, 1))[0])


def test_offsets_beyond_32_bits():
    rows, width = 70_000, 16384  # z: 2.3e9 elements, 4.6 GB in bf16
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    z_RF = torch.zeros(rows, 2 * width, device="cuda", dtype=torch.bfloat16)
    z_RF[-3:] = torch.randn(3, 2 * width, device="cuda")
    grad_RI, factor_R = torch.ones(rows, width, device="cuda", dtype=torch.bfloat16), torch.rand(rows, device="cuda")
    whole, part = backward(grad_RI, z_RF, factor_R), backward(grad_RI[-3:], z_RF[-3:], factor_R[-3:])
    for ours, want in zip(whole, part, strict=True):
        assert torch.equal(ours[-3:], want)
        assert not ours[:-3].any()
    a_RI = swiglu_forward(z_RF, factor_R, out=torch.empty_like(grad_RI))
    assert torch.equal(a_RI[-3:], part[0])
    assert not a_RI[:-3].any()
