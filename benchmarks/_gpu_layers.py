"""One layer's experts, forward and backward, against its bare products and against what others make of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import _gpu_peers
from benchmarks._gpu_cases import Tensors
from benchmarks._gpu_clock import Clock
from benchmarks._harness import row

# ‖a − b‖ / ‖b‖ of two right answers in bf16: each side rounds its intermediate results at other places.
TOLERANCE = 2e-2
_GRADIENTS = ("y", "gradient of x", "gradient of the probabilities", "gradient of gate_up", "gradient of down")


def measure(tensors: Tensors, clock: Clock, seconds: float) -> Iterator[dict | str]:
    """Rows of one case; a contender that fails or computes something else gives a note instead.

    seconds: for one pair of contenders; what others take beside ours is not more than a few times that.
    """
    case = str(tensors.case)
    layer, gate_up, down = _gpu_peers.our_layer(tensors.case, clock.device)
    step = _step(_gpu_peers.ours(layer, "auto"), tensors, gate_up, down)
    want = step()
    bare = _gpu_peers.bare_products(tensors, gate_up, down)
    mine, products = clock.medians([step, bare], seconds=seconds)
    yield row(f"{case} experts, forward+backward", mine, products, "its bare grouped products")
    del bare
    ours = [
        (f"ours, back end {name}", partial(_gpu_peers.ours, layer, name))
        for name in _gpu_peers.backends(tensors, gate_up, down)
    ]
    for name, build in (*_builders(tensors), *ours):
        try:
            peer = _step(build(), tensors, gate_up, down)
            got = peer()
            if problem := _difference(got, want):
                raise ValueError(f"it computes something else: {problem}")
            del got
            mine, theirs = clock.medians([step, peer], seconds=seconds)
            yield row(f"{case} experts, forward+backward", mine, theirs, name)
        except ImportError as error:
            yield f"No row for {name}: {str(error).splitlines()[0][:200]}"
        except Exception as error:  # not for this device or this shape, not enough memory
            yield f"No row for {name}, {case}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        peer = None
        gc.collect()
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()


def _builders(tensors: Tensors) -> Iterator[tuple[str, Callable[[], _gpu_peers.Experts]]]:
    yield "torchtitan's recipe", lambda: _gpu_peers.torchtitan
    yield "Megatron-Core's recipe", lambda: _gpu_peers.megatron_core
    yield "moe_dist by transformers' interface", partial(_gpu_peers.transformers_with_ours, tensors.case)
    for name in _gpu_peers.registered():
        yield f"transformers {name}", partial(_gpu_peers.transformers_experts, tensors.case, name)


def _step(
    experts: _gpu_peers.Experts, tensors: Tensors, gate_up: torch.Tensor, down: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, ...]]:
    x_TH, probs_TK = tensors.x_TH.detach().requires_grad_(), tensors.probs_TK.detach().requires_grad_()

    def step():
        y_TH = experts(x_TH, tensors.ids_TK, probs_TK, gate_up, down)
        return y_TH.detach(), *torch.autograd.grad(y_TH, (x_TH, probs_TK, gate_up, down), tensors.dy_TH)

    return step


def _difference(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> str:
    """What differs the most, if by too much. Not a number counts as different."""
    worst = ""
    for name, ours, theirs in zip(_GRADIENTS, want, got, strict=True):
        error = float(torch.linalg.vector_norm((theirs - ours).float()) / torch.linalg.vector_norm(ours.float()))
        if not error <= TOLERANCE:
            worst += f"{name} by {error:.1e} "
    return worst
