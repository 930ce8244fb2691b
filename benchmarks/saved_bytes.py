"""Bytes that a layer's forward keeps for its backward, against transformers at 64 experts.

    python -m benchmarks.saved_bytes [--json FILE] [--full]

One MoE block in one process, router included, every contender on the same weights, tokens and routing. "saved" are the
storages that autograd's saved tensors lie in, each counted once, parameters not counted. "kept" is what the forward
leaves in memory, its output included, by the events of torch's allocator: also what a function keeps beside its saved
tensors. The goal is at most half of each contender's; the exit status is 1 where it is missed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import _moe_peers
from benchmarks._harness import Missed, row, run
from benchmarks._measure import allocated
from benchmarks._moe_peers import Contender, Problem, Shape
from moe_dist.ops import native
from moe_dist.parallel.grid import Grid

SHAPES = (Shape(2048, 64, 8, 1024, 512), Shape(2048, 64, 6, 2048, 1408))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOAL = 2.0
MB = 1e6


def main() -> None:
    run("saved_bytes", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict]:
    missed = []
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            for line in measure(shape, name, dtype):
                if line["ratio"] < GOAL and "saved" in line["case"]:
                    missed.append(f"{line['case']}: {1 / line['ratio']:.2f} of {line['peer_name']}")
                yield line
    if missed:
        raise Missed("more than half: " + "; ".join(missed))


def measure(shape: Shape, name: str, dtype: torch.dtype) -> Iterator[dict]:
    problem = Problem(shape, dtype, Grid.single())
    mine = _moe_peers.ours(problem)
    weights = _moe_peers.share_weights(mine)
    sizes = saved(problem, mine), kept(problem, mine)
    for which in ("grouped_mm", "eager"):
        peer = _moe_peers.transformers_experts(problem, which, weights)
        for what, ours, theirs in zip(
            ("saved", "kept"), sizes, (saved(problem, peer), kept(problem, peer)), strict=True
        ):
            yield row(f"{shape} {name}, {what}", ours / MB, theirs / MB, peer.name, unit="MB")


def saved(problem: Problem, contender: Contender) -> int:
    """Bytes of the storages of saved tensors. What shares memory with a parameter is not counted."""
    hidden_TH, _ = problem.inputs()
    of_weights = {parameter.untyped_storage().data_ptr() for parameter in contender.modules.parameters()}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # stays alive as long as the output does, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output_TH = contender.run(hidden_TH)
    del output_TH
    return sum(storages.values())


def kept(problem: Problem, contender: Contender) -> int:
    """Bytes that are there after a forward and were not before, beside the input."""
    hidden_TH, _ = problem.inputs()
    outputs = []
    _, left = allocated(lambda: outputs.append(contender.run(hidden_TH)))
    return left


if __name__ == "__main__":
    print(native.status())
    main()
