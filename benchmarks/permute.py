"""permute and unpermute, forward and backward, against what torch can do and against two known recipes.

    python -m benchmarks.permute [--json FILE] [--full]

"best torch" is, for each of the four passes, the fastest of several compositions of torch operations, the backward
written by hand; both sides write into the same preallocated outputs. The recipes are whole steps with autograd, from
the routing to the gradients, and so is ours beside them. "with a cast": fp32 tokens to bf16 rows, and the rows summed
without probabilities into fp32 tokens. "threaded copy" is the time in which `copy_` moves the bytes
that the four passes must move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks._harness import interleaved, row, run
from benchmarks._permute_peers import Problem, cast_compositions, compositions, megatron_core_unfused, torchtitan
from moe_dist.ops import native, passes, permute, row_plan, unpermute

# tokens, experts, chosen a token, hidden
SHAPES = ((8192, 8, 2, 1024), (8192, 64, 6, 1024), (8192, 128, 8, 1024), (4096, 256, 8, 2048))
IN_CACHE = ((64, 8, 2, 256), (128, 64, 8, 512))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# ‖a − b‖ / ‖b‖ of two right answers; in bf16 the compositions round each of their steps
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def main() -> None:
    torch.set_num_threads(2)
    run("permute", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict]:
    rounds = 41 if full else 15
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            yield from measure_large(shape, name, dtype, rounds)
        for shape in IN_CACHE:
            yield from measure_passes(draw(shape, dtype), f"{label(shape)} {name}, in cache", 20 * rounds, each=False)


def measure_large(shape: tuple[int, ...], name: str, dtype: torch.dtype, rounds: int) -> Iterator[dict]:
    problem, case = draw(shape, dtype), f"{label(shape)} {name}"
    if dtype == torch.float32:  # ids have no dtype to choose
        yield measure_row_map(problem, label(shape), 4 * rounds)
        yield from measure_casts(problem, label(shape), rounds)
    yield from measure_passes(problem, case, rounds, each=True)
    yield from measure_recipes(problem, case, rounds)


def measure_row_map(problem: Problem, case: str, rounds: int) -> dict:
    ids_TK, experts = problem.ids_TK, problem.plan.num_experts
    ours, peer = interleaved(
        [
            lambda: row_plan(ids_TK, num_experts=experts),
            lambda: torch.argsort(ids_TK.view(-1), stable=True),
        ],
        rounds=rounds,
    )
    return row(f"{case} row map", ours, peer, "torch argsort, stable")


def measure_casts(problem: Problem, case: str, rounds: int) -> Iterator[dict]:
    p, narrow_NH, wide_TH = problem, torch.zeros_like(problem.rows_NH, dtype=torch.bfloat16), problem.out["y"]
    ours = {
        "permute": lambda: passes.permute(p.x_TH, p.plan, out=narrow_NH),
        "unpermute": lambda: passes.unpermute(narrow_NH, p.plan, out=wide_TH),
    }
    for which, peers in cast_compositions(problem, narrow_NH, wide_TH).items():
        result = {"permute": narrow_NH, "unpermute": wide_TH}[which]
        ours[which]()
        want = result.clone()
        for name, peer in peers.items():
            peer()
            check(result, want, name, problem)
        mine, *times = interleaved([ours[which], *peers.values()], rounds=rounds)
        best, name = min(zip(times, peers, strict=True))
        yield row(f"{case} {which} with a cast", mine, best, f"best torch: {name}")


def measure_passes(problem: Problem, case: str, rounds: int, *, each: bool) -> Iterator[dict]:
    """The four passes one by one (`each`) and in one go, and the same bytes copied."""
    ours, peers = our_passes(problem), compositions(problem)
    best = {name: fastest(problem, ours[name], peers[name]) for name in ours}
    if each:
        for name, function in ours.items():
            mine, peer = interleaved([function, peers[name][best[name]]], rounds=rounds)
            yield row(f"{case} {name}", mine, peer, f"best torch: {best[name]}")
    source = torch.zeros_like(problem.rows_NH)
    target = torch.empty_like(source)
    chosen = [peers[name][best[name]] for name in ours]
    mine, peer, copy = interleaved(
        [
            lambda: [function() for function in ours.values()],
            lambda: [function() for function in chosen],
            lambda: target.copy_(source),
        ],
        rounds=rounds,
        seconds=4.0,
    )
    yield row(f"{case} forward+backward", mine, peer, "best torch")
    if each:
        copy_of_all = copy * problem.pass_bytes / (2 * source.nbytes)
        yield row(f"{case} bytes moved, forward+backward", mine, copy_of_all, "threaded copy")


def measure_recipes(problem: Problem, case: str, rounds: int) -> Iterator[dict]:
    """Whole steps with autograd: row map, permute, unpermute, gradients of tokens and probabilities."""
    experts = problem.plan.num_experts
    x_TH = problem.x_TH.detach().requires_grad_()
    probs_TK = problem.probs_TK.detach().requires_grad_()

    def our_step():
        rows_NH, plan = permute(x_TH, problem.ids_TK, num_experts=experts)
        y_TH = unpermute(rows_NH, plan, probs_TK)
        return torch.autograd.grad(y_TH, (x_TH, probs_TK), problem.dy_TH)

    recipes = {
        "Megatron-Core, unfused recipe": megatron_core_unfused(problem, experts),
        "torchtitan's recipe": torchtitan(problem),
    }
    for _ in range(3):  # a virtual machine's memory is slow until each page has been used once
        dx_TH, _ = our_step()
    for name, step in recipes.items():
        check(step()[0], dx_TH, name, problem)
    ours, *peers = interleaved([our_step, *recipes.values()], rounds=rounds, seconds=5.0)
    for name, peer in zip(recipes, peers, strict=True):
        yield row(f"{case} step with autograd", ours, peer, name)


def our_passes(p: Problem) -> dict[str, Callable[[], object]]:
    out = p.out
    return {
        "permute": lambda: passes.permute(p.x_TH, p.plan, out=out["rows"]),
        "unpermute": lambda: passes.unpermute(p.rows_NH, p.plan, p.probs_TK, out=out["y"]),
        "permute backward": lambda: passes.unpermute(p.drows_NH, p.plan, out=out["dx"]),
        "unpermute backward": lambda: passes.unpermute_backward(
            p.dy_TH, p.plan, probs_TK=p.probs_TK, rows_NH=p.rows_NH, out=out["drows"], out_probs=out["dprobs"]
        ),
    }


def fastest(problem: Problem, ours: Callable[[], object], peers: dict[str, Callable[[], object]]) -> str:
    """Name of the composition that takes the least time, each checked against our result first."""
    for tensor in problem.out.values():
        tensor.zero_()
    ours()
    want = {name: tensor.clone() for name, tensor in problem.out.items()}
    for name, peer in peers.items():
        peer()
        for key, tensor in problem.out.items():
            check(tensor, want[key], f"{name}: {key}", problem)
    times = interleaved(list(peers.values()), rounds=5, seconds=1.0)
    return min(zip(times, peers, strict=True))[1]


def check(theirs: torch.Tensor, ours: torch.Tensor, name: str, problem: Problem) -> None:
    error = float((theirs.float() - ours.float()).norm() / ours.float().norm().clamp(min=1e-20))
    if error > TOLERANCE[problem.x_TH.dtype]:
        raise RuntimeError(f"{name} differs from ours by {error:.1e}")


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    tokens, experts, k, hidden = shape
    generator = torch.Generator().manual_seed(0)

    def normal(length):
        return torch.randn(length, hidden, generator=generator).to(dtype)

    ids_TK = torch.rand(tokens, experts, generator=generator).topk(k).indices
    plan = row_plan(ids_TK, num_experts=experts)
    x_TH, dy_TH, rows_NH, drows_NH = normal(tokens), normal(tokens), normal(tokens * k), normal(tokens * k)
    out = {
        "rows": torch.zeros_like(rows_NH),
        "y": torch.zeros_like(x_TH),
        "dx": torch.zeros_like(x_TH),
        "drows": torch.zeros_like(rows_NH),
        "dprobs": torch.zeros(tokens, k),
    }
    probs_TK = torch.rand(tokens, k, generator=generator).softmax(1)
    return Problem(x_TH, ids_TK, probs_TK, dy_TH, rows_NH, drows_NH, plan, out)


def label(shape: tuple[int, ...]) -> str:
    return "T{} E{} K{} H{}".format(*shape)


if __name__ == "__main__":
    print(native.status())
    main()
