"""Each data-movement kernel against a copy of as many bytes by the same device, and the row map against an argsort."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks._gpu_cases import Tensors
from benchmarks._gpu_clock import Clock, copy_time
from benchmarks._harness import row
from moe_dist.ops import passes, row_plan
from moe_dist.ops.swiglu import swiglu_backward, swiglu_forward


def measure(tensors: Tensors, clock: Clock) -> Iterator[dict | str]:
    """Rows of one case. `gigabytes_per_second` counts what has to be moved: each operand once."""
    case = str(tensors.case)
    for name, (function, bytes_moved) in kernels(tensors).items():
        ours, copy = clock.medians([function], seconds=0.3)[0], copy_time(clock, bytes_moved)
        line = row(f"{case} {name}", ours, copy, "copy of as many bytes")
        yield line | {"gigabytes_per_second": round(bytes_moved / float(ours) / 1e6, 1)}
    yield from _permutes(tensors, clock)
    flat_N = tensors.ids_TK.view(-1)
    ours, peer = clock.medians(
        [
            lambda: row_plan(tensors.ids_TK, num_experts=tensors.case.experts, num_rows=tensors.case.rows),
            lambda: torch.argsort(flat_N, stable=True),
        ],
        seconds=0.3,
    )
    yield row(f"{case} row map", ours, peer, "torch argsort, stable")


def kernels(t: Tensors) -> dict[str, tuple[Callable[[], object], int]]:
    """name -> (what runs it into preallocated memory, bytes that it has to move)."""
    case, plan, x_TH = t.case, t.plan, t.x_TH
    one, all_rows = x_TH.nbytes, x_TH.nbytes * case.top_k
    rows_NH, drows_NH = x_TH.new_ones(case.rows, case.hidden), x_TH.new_empty(case.rows, case.hidden)
    y_TH, dprobs_TK = torch.empty_like(x_TH), torch.empty_like(t.probs_TK)
    z_NF = torch.randn(case.rows, 2 * case.width, device=x_TH.device).to(x_TH.dtype)
    a_NI, da_NI, dz_NF = x_TH.new_empty(case.rows, case.width), z_NF[:, : case.width].contiguous(), z_NF.clone()
    factor_N, dfactor_N = t.probs_TK.view(-1), dprobs_TK.view(-1)
    return {
        "permute": (lambda: passes.permute(x_TH, plan, out=rows_NH), one + all_rows),
        "unpermute": (lambda: passes.unpermute(rows_NH, plan, t.probs_TK, out=y_TH), one + all_rows),
        "unpermute, plain sum": (lambda: passes.unpermute(rows_NH, plan, out=y_TH), one + all_rows),
        "unpermute backward": (
            lambda: passes.unpermute_backward(
                t.dy_TH, plan, probs_TK=t.probs_TK, rows_NH=rows_NH, out=drows_NH, out_probs=dprobs_TK
            ),
            one + 2 * all_rows,
        ),
        "swiglu": (lambda: swiglu_forward(z_NF, factor_N, out=a_NI), z_NF.nbytes + a_NI.nbytes),
        "swiglu backward": (
            lambda: swiglu_backward(da_NI, z_NF, factor_N, out=a_NI, out_grad=dz_NF, out_factor=dfactor_N),
            2 * (z_NF.nbytes + a_NI.nbytes),
        ),
    }


def _permutes(t: Tensors, clock: Clock) -> Iterator[dict | str]:
    """permute beside torch's index_select and a Triton kernel, each into the same memory and checked first."""
    case, rows_NH = t.case, t.x_TH.new_empty(t.case.rows, t.case.hidden)
    token_of_row_N = t.plan.slot_of_row_N.long() // case.top_k
    peers = {"torch index_select": lambda: torch.index_select(t.x_TH, 0, token_of_row_N, out=rows_NH)}
    if t.x_TH.is_cuda:
        try:
            from benchmarks import _gpu_triton

            peers["Triton, one program a token"] = lambda: _gpu_triton.permute(t.x_TH, t.plan.row_of_slot_TK, rows_NH)
        except ImportError as error:
            yield f"No Triton permute: {error}"
    want_NH = passes.permute(t.x_TH, t.plan)
    for name, peer in peers.items():
        try:
            peer()
        except Exception as error:  # a compiler that Triton does not find, for one
            yield f"No row for {name}: {type(error).__name__}: {str(error)[:200]}"
            continue
        if not torch.equal(rows_NH, want_NH):
            raise RuntimeError(f"{name} differs from ours at {case}")
        ours, theirs = clock.medians([lambda: passes.permute(t.x_TH, t.plan, out=rows_NH), peer], seconds=0.3)
        yield row(f"{case} permute", ours, theirs, name)
