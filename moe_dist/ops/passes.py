"""The four passes under permute and unpermute, and the choice of what runs them.

Each takes preallocated outputs (`out=`), or the dtype of the outputs (`dtype=`; None: that of the input), and knows
nothing of autograd; shapes and dtypes are in `reference`. permute's backward is `unpermute` without probabilities.
"""

import torch

from moe_dist.ops import kernels, native, reference

_NATIVE_DTYPES = {torch.float32, torch.bfloat16}
_MAX_EXPERTS = {"cpp": 65535, "cuda": 8192}  # of the row map: kMaxExperts in csrc/permute.h


def backend(device="cpu") -> str:
    """What runs for a tensor on `device`: "cuda" or "cpp" (native kernels), or "torch" (the plain reference).

    float16 and float64 always take the plain reference.
    """
    kind = torch.device(device).type
    if kind == "cuda" and native.has_cuda():
        return "cuda"
    return "cpp" if kind == "cpu" and native.has_cpu() else "torch"


def _choose(tensor, dtype, out):
    dtypes = {tensor.dtype, out.dtype if out is not None else dtype or tensor.dtype}
    return kernels if backend(tensor.device) != "torch" and dtypes <= _NATIVE_DTYPES else reference


def row_map(ids_TK, num_experts, num_rows=None, align=1):
    native_runs = num_experts <= _MAX_EXPERTS.get(backend(ids_TK.device), 0)
    return (kernels if native_runs else reference).row_map(ids_TK, num_experts, num_rows, align)


def permute(x_TH, plan, *, dtype=None, out=None):
    return _choose(x_TH, dtype, out).permute(x_TH, plan, dtype=dtype, out=out)


def unpermute(rows_NH, plan, probs_TK=None, *, dtype=None, out=None):
    return _choose(rows_NH, dtype, out).unpermute(rows_NH, plan, probs_TK, dtype=dtype, out=out)


def unpermute_backward(dy_TH, plan, *, probs_TK=None, rows_NH=None, dtype=None, out=None, out_probs=None):
    return _choose(dy_TH, dtype, out).unpermute_backward(
        dy_TH, plan, probs_TK=probs_TK, rows_NH=rows_NH, dtype=dtype, out=out, out_probs=out_probs
    )
