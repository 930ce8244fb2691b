"""The four passes under permute and unpermute, and the choice of what runs them.

Each takes preallocated outputs (`out=`) and knows nothing of autograd; shapes and dtypes are in `reference`.
permute's backward is `unpermute` without probabilities.
"""

import torch

from moe_dist.ops import kernels, native, reference

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_MAX_CUDA_EXPERTS = 8192  # the CUDA row map keeps a counter for each expert in shared memory


def backend(device="cpu") -> str:
    """What runs for a tensor on `device`: "cuda" or "cpp" (native kernels), or "torch" (the plain reference).

    float16 and float64 always take the plain reference.
    """
    kind = torch.device(device).type
    if kind == "cuda" and native.has_cuda():
        return "cuda"
    return "cpp" if kind == "cpu" and native.has_cpu() else "torch"


def _choose(tensor):
    native_runs = tensor.dtype in _NATIVE_DTYPES and backend(tensor.device) != "torch"
    return kernels if native_runs else reference


def row_map(ids_TK, num_experts, num_rows=None):
    kind = backend(ids_TK.device)
    native_runs = kind == "cpp" or (kind == "cuda" and num_experts <= _MAX_CUDA_EXPERTS)
    return (kernels if native_runs else reference).row_map(ids_TK, num_experts, num_rows)


def permute(x_TH, plan, *, out=None):
    return _choose(x_TH).permute(x_TH, plan, out=out)


def unpermute(rows_NH, plan, probs_TK=None, *, out=None):
    return _choose(rows_NH).unpermute(rows_NH, plan, probs_TK, out=out)


def unpermute_backward(dy_TH, plan, *, probs_TK=None, rows_NH=None, out=None, out_probs=None):
    return _choose(dy_TH).unpermute_backward(
        dy_TH, plan, probs_TK=probs_TK, rows_NH=rows_NH, out=out, out_probs=out_probs
    )
