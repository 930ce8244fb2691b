"""The four passes under permute and unpermute, and the choice of what runs them.

Each takes preallocated outputs (`out=`) and knows nothing of autograd; shapes and dtypes are in `reference`.
permute's backward is `unpermute` without probabilities.
"""

from moe_dist.ops import reference


def backend(device="cpu") -> str:
    """What runs for a tensor on `device`: "cuda" or "cpp" (native kernels), or "torch" (the plain reference).

    float16 and float64 always take the plain reference.
    """
    return "torch"


def row_map(ids_TK, num_experts, num_rows=None):
    return reference.row_map(ids_TK, num_experts, num_rows)


def permute(x_TH, plan, *, out=None):
    return reference.permute(x_TH, plan, out=out)


def unpermute(rows_NH, plan, probs_TK=None, *, out=None):
    return reference.unpermute(rows_NH, plan, probs_TK, out=out)


def unpermute_backward(dy_TH, plan, *, probs_TK=None, rows_NH=None, out=None, out_probs=None):
    return reference.unpermute_backward(
        dy_TH, plan, probs_TK=probs_TK, rows_NH=rows_NH, out=out, out_probs=out_probs
    )
