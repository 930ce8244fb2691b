"""`python -m benchmarks._gpu_sanitize`: every kernel once, on small and odd shapes, compared with plain torch.

Short, because compute-sanitizer makes it many times slower. Exit status 1 where a result differs.
"""

from __future__ import annotations

import sys

import torch

from moe_dist.ops import RowPlan, passes, reference, row_plan
from moe_dist.ops.swiglu import swiglu, swiglu_backward, swiglu_forward

SHAPES = ((37, 3, 8, 33), (64, 8, 64, 256), (1500, 4, 40, 72))  # tokens, k, experts, hidden


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bad = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            bad += [f"{name} {shape} {dtype}" for name in check(device, dtype, *shape)]
    print(f"{passes.backend(device)} on {device}: " + (", ".join(bad) + " differ" if bad else "all results agree"))
    return 1 if bad else 0


def check(device: str, dtype: torch.dtype, tokens: int, k: int, experts: int, hidden: int) -> list[str]:
    """Names of the passes that are more than rounding away from the reference."""
    torch.manual_seed(0)
    ids_TK = torch.rand(tokens, experts).argsort(1)[:, :k]
    ids_TK[torch.rand(tokens, k) < 0.2] = -1
    want = RowPlan(*reference.row_map(ids_TK, experts), experts)
    plan = row_plan(ids_TK.to(device), num_experts=experts)
    x_TH, dy_TH = (torch.randn(tokens, hidden).to(dtype) for _ in range(2))
    rows_NH, probs_TK = torch.randn(want.num_rows, hidden).to(dtype), torch.rand(tokens, k)
    there = [tensor.to(device) for tensor in (x_TH, dy_TH, rows_NH, probs_TK)]
    z_NF, da_NI, factor_N = torch.randn(want.num_rows, 2 * hidden).to(dtype), rows_NH, torch.rand(want.num_rows)
    wide_NF, wide_N = z_NF.double().requires_grad_(), factor_N.double().requires_grad_()
    a_NI = swiglu(wide_NF) * wide_N[:, None]
    dz_NF, dfactor_N = torch.autograd.grad(a_NI, (wide_NF, wide_N), da_NI.double())
    out = [tensor.to(device) for tensor in (da_NI, torch.empty_like(z_NF), torch.empty_like(factor_N))]
    on_device = [tensor.to(device) for tensor in (da_NI, z_NF, factor_N)]
    swiglu_backward(*on_device, out=out[0], out_grad=out[1], out_factor=out[2])
    pairs = {
        "row map": (plan.row_of_slot_TK, want.row_of_slot_TK),
        "permute": (passes.permute(there[0], plan), reference.permute(x_TH, want)),
        "unpermute": (
            passes.unpermute(there[2], plan, there[3]), reference.unpermute(rows_NH, want, probs_TK)
        ),
        "swiglu": (swiglu_forward(on_device[1], on_device[2], out=torch.empty_like(on_device[0])), a_NI),
        "swiglu again": (out[0], a_NI),
        "swiglu backward": (out[1], dz_NF),
        "swiglu's factor": (out[2], dfactor_N),
    }  # fmt: skip
    ours = passes.unpermute_backward(there[1], plan, probs_TK=there[3], rows_NH=there[2])
    theirs = reference.unpermute_backward(dy_TH, want, probs_TK=probs_TK, rows_NH=rows_NH)
    pairs |= {"unpermute backward": (ours[0], theirs[0]), "probabilities": (ours[1], theirs[1])}
    bound = 1e-6 if dtype == torch.float32 else 2**-8
    return [name for name, (got, expected) in pairs.items() if not _error(got, expected) <= bound]


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().cpu().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


if __name__ == "__main__":
    sys.exit(main())
