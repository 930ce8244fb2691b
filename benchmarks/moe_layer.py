"""One MoE layer's step (router, experts, forward and backward) against transformers and DeepSpeed.

    python -m benchmarks.moe_layer [--json FILE] [--full]

In one process with 2 threads: transformers' `grouped_mm` and `eager` experts, on the very same weights. On 2 gloo ranks
with 1 thread each, which share out the tokens and the experts: transformers' expert parallelism, DeepSpeed AutoEP and
DeepSpeed's own MoE layer. Every contender gets the same weights, tokens and routing; before anything is timed its
output, the gradient of its input and of three experts' weights are compared with ours. Ours and the peer then take
turns in one process, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from benchmarks import _moe_peers
from benchmarks._harness import Median, row, run
from benchmarks._moe_peers import Contender, Problem, Shape
from benchmarks._ranks import on_ranks
from moe_dist.ops import native
from moe_dist.parallel.grid import Grid, build_grid

SHAPES = (Shape(2048, 8, 2, 1024, 1024), Shape(2048, 64, 8, 1024, 512), Shape(2048, 64, 6, 2048, 1408))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# ‖a − b‖ / ‖b‖ of two right answers: in bf16 each side rounds its intermediate results at other places.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
ROUNDS = range(3, 10)  # at least, below
SECONDS, SECONDS_FULL = 6.0, 40.0  # for a pair; the rounds are chosen to fit


def main() -> None:
    torch.set_num_threads(2)
    run("moe_layer", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict | str]:
    seconds = SECONDS_FULL if full else SECONDS
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            problem = Problem(shape, dtype, Grid.single())
            mine = _moe_peers.ours(problem)
            weights = _moe_peers.share_weights(mine)
            implementations = ["grouped_mm", "eager"]
            if shape.experts > 8 and not full:
                yield f"No row for transformers eager at {shape} {name}: 6 to 60 seconds a step, with --full only."
                implementations.remove("eager")
            peers = [partial(_moe_peers.transformers_experts, problem, which, weights) for which in implementations]
            yield from duel(f"{shape} {name}, 1 process", problem, mine, peers, seconds)
    yield from on_ranks(2, two_ranks, seconds)


def two_ranks(seconds: float) -> Iterator[dict | str]:
    """The rows of two ranks' joint work."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed looks for one
    grid = build_grid(expert=2)
    builders = (_moe_peers.transformers_expert_parallel, _moe_peers.deepspeed_autoep, _moe_peers.deepspeed_native)
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            problem = Problem(shape, dtype, grid)
            peers = [partial(build, problem) for build in builders]
            yield from duel(f"{shape} {name}, 2 ranks", problem, _moe_peers.ours(problem), peers, seconds)


def duel(
    case: str, problem: Problem, mine: Contender, builders: list[Callable[[], Contender]], seconds: float
) -> Iterator[dict | str]:
    """One row for each peer that runs and computes the same. Collective over the ranks of the problem."""
    expected, _ = answer(problem, mine)
    for build in builders:
        try:
            peer = build()
            got, first = answer(problem, peer)
            error, what = difference(expected, got)
            if not agreed(problem, int(error <= TOLERANCE[problem.dtype])):
                raise ValueError(f"it computes something else: {what} differs by {error:.1e}")
            # A first step is slower than those that follow; the estimate only has to fit the time that there is.
            rounds = agreed(problem, int(seconds / (2 * first)))
            ours, theirs = alternate(problem, (mine, peer), min(max(rounds, ROUNDS.start), ROUNDS.stop - 1))
        except Exception as error:
            if problem.grid.rank == 0:
                yield f"No row for {build.func.__name__}, {case}: {type(error).__name__}: {str(error)[:300]}"
            continue
        yield row(case, ours, theirs, peer.name)
        del peer
        gc.collect()


def agreed(problem: Problem, number: int) -> int:
    """The smallest of the ranks' numbers."""
    smallest = torch.tensor(number)
    if problem.grid.expert_group is not None:
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=problem.grid.expert_group)
    return int(smallest)


def answer(problem: Problem, contender: Contender) -> tuple[dict[str, torch.Tensor], float]:
    """What one step gives, and the seconds that it took."""
    hidden_TH, grad_TH = problem.inputs()
    start = time.perf_counter()
    output_TH = contender.run(hidden_TH)
    output_TH.backward(grad_TH)
    seconds = time.perf_counter() - start
    tensors = {"output": output_TH.detach(), "input gradient": hidden_TH.grad}
    for expert in {0, problem.mine // 2, problem.mine - 1}:
        gate_up, down = contender.gradient(expert)
        tensors |= {f"gate_up gradient {expert}": gate_up.clone(), f"down gradient {expert}": down.clone()}
    forget(contender, hidden_TH)
    return tensors, seconds


def forget(contender: Contender, hidden_TH: torch.Tensor) -> None:
    hidden_TH.grad = None
    for parameter in contender.modules.parameters():
        parameter.grad = None


def difference(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative difference, and of what. Not a number counts as infinity."""
    errors = []
    for what, tensor in expected.items():
        error = ((got[what].double() - tensor.double()).norm() / tensor.double().norm()).item()
        errors.append((error if error == error else float("inf"), what))
    return max(errors)


def alternate(problem: Problem, contenders: tuple[Contender, ...], rounds: int) -> list[float]:
    """Median milliseconds of each contender's step, in turns; on several ranks until the last one is done.

    Gradients are dropped between steps and outside the time.
    """
    together = dist.barrier if problem.grid.expert > 1 else lambda: None
    hidden_TH, grad_TH = problem.inputs()
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, series in zip(contenders, times, strict=True):
            together()
            start = time.perf_counter()
            contender.run(hidden_TH).backward(grad_TH)
            together()
            series.append(1e3 * (time.perf_counter() - start))
            forget(contender, hidden_TH)
    return [Median(series) for series in times]


if __name__ == "__main__":
    print(native.status())
    main()
