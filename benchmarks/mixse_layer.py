"""A linear layer with a mixture of LoRA experts (MiXSE) against branches summed, the concatenated form, and X-LoRA.

    python -m benchmarks.mixse_layer [--json FILE] [--full]

4,096 tokens with one expert each, the same tensors for all, one thread as a rank has it; more shapes with --full.
"LoRA part" adds to a base output that is there; "layer" computes that too; "router step" is the layer forward and
backward, with gradients of the tokens and of the mixture's weights; "router step memory" is the peak of what that
allocates. Every peer's results are compared with ours first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks._harness import interleaved, row, run
from benchmarks._measure import allocated
from benchmarks._mixse_peers import PEERS, Layer, Problem, Shape, ours
from moe_dist.ops import native

TOKENS = 4096
# experts, rank, hidden
CASES = [(4, 8, 2048), (16, 8, 2048), (64, 8, 2048), (16, 64, 2048)]
MORE_CASES = [(n, 8, 3072) for n in (4, 16, 64)] + [(4, 64, 2048)]  # with --full
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# ‖a − b‖ / ‖b‖ of two right answers; in bf16 each side rounds at other places
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
STEPS = {(4, 8, 2048), (16, 8, 2048)}  # cases whose router step is measured without --full


def main() -> None:
    torch.set_num_threads(1)
    run("mixse_layer", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict | str]:
    seconds = 20.0 if full else 1.0
    for name, dtype in DTYPES.items():
        for case in CASES + MORE_CASES if full else CASES:
            shape = Shape(TOKENS, *case)
            yield from measure(shape, name, dtype, seconds=seconds, step=full or case in STEPS)


def measure(shape: Shape, name: str, dtype: torch.dtype, *, seconds: float, step: bool) -> Iterator[dict | str]:
    problem = Problem(shape, dtype)
    mine, peers = ours(problem), {who: build(problem) for who, build in PEERS.items()}
    title = f"{shape} {name} ({problem.form})"
    with torch.no_grad():
        for who, peer in peers.items():
            check(who, dtype, mine(None, problem.x_TH, problem.mix_TN), peer(None, problem.x_TH, problem.mix_TN))
        y_TO = torch.zeros_like(problem.x_TH)
        parts = [lambda f=f: f(y_TO, problem.x_TH, problem.mix_TN) for f in (mine, *peers.values())]
        yield from rows(f"{title}, LoRA part", parts, list(peers), seconds)
        layers = [lambda f=f: f(None, problem.x_TH, problem.mix_TN) for f in (mine, *peers.values())]
        yield from rows(f"{title}, layer", layers, list(peers), seconds)
        base = partial(F.linear, problem.x_TH, problem.weight_HH)
        yield from rows(f"{title}, layer", [layers[0], base], ["base linear alone"], seconds)
    if step:
        steps = [lambda f=f: router_step(problem, f) for f in (mine, *peers.values())]
        expected = steps[0]()
        for who, peer_step in zip(peers, steps[1:], strict=True):
            for got, want in zip(peer_step(), expected, strict=True):
                check(who, dtype, want, got)
        yield from rows(f"{title}, router step", steps, list(peers), seconds)
        bytes_mine, *bytes_theirs = (allocated(one)[0] / 1e6 for one in steps)
        for who, theirs in zip(peers, bytes_theirs, strict=True):
            yield row(f"{title}, router step memory", bytes_mine, theirs, who, "MB")


def rows(case: str, functions: list[Callable[[], object]], names: list[str], seconds: float) -> Iterator[dict]:
    mine, *others = interleaved(functions, rounds=15, seconds=seconds)
    for name, theirs in zip(names, others, strict=True):
        yield row(case, mine, theirs, name)


def router_step(problem: Problem, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the tokens and of the weights that are not zero."""
    x_TH, mix_TN = problem.x_TH.detach().requires_grad_(), problem.mix_TN.detach().requires_grad_()
    grad_x, grad_mix = torch.autograd.grad(layer(None, x_TH, mix_TN), (x_TH, mix_TN), problem.grad_TH)
    return grad_x, grad_mix[problem.mix_TN != 0]


def check(name: str, dtype: torch.dtype, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = float((theirs.double() - ours.double()).norm() / ours.double().norm())
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(f"{name} differs from ours by {error:.1e}")


if __name__ == "__main__":
    print(native.status())
    main()
