"""`set_experts_implementation("moe_dist")` against the implementations that transformers has built in.

    python -m benchmarks.hf_experts [--json FILE] [--full]

One MoE block of a stock model in one process with 2 threads: router, experts, forward and backward; the same module,
weights and tokens, only the implementation of the experts differs. What each computes is compared before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import moe_dist.hf
from benchmarks import _moe_peers
from benchmarks._harness import run
from benchmarks._moe_peers import Problem
from benchmarks.moe_layer import DTYPES, SECONDS, SECONDS_FULL, SHAPES, duel
from moe_dist.ops import native
from moe_dist.parallel.grid import Grid


def main() -> None:
    torch.set_num_threads(2)
    run("hf_experts", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict | str]:
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            problem = Problem(shape, dtype, Grid.single())
            weights = _moe_peers.share_weights(_moe_peers.ours(problem))
            mine = _moe_peers.transformers_experts(problem, moe_dist.hf.NAME, weights)
            # batched_mm copies an expert's weights for every token; eager takes a minute a step at the last shape.
            names = ["grouped_mm"] if shape == SHAPES[-1] and not full else ["grouped_mm", "eager"]
            peers = [partial(_moe_peers.transformers_experts, problem, which, weights) for which in names]
            yield from duel(f"{shape} {name}", problem, mine, peers, SECONDS_FULL if full else SECONDS)
    yield "batched_mm is left out: it copies an expert's weights for every token and does not fit into memory here."


if __name__ == "__main__":
    print(native.status())
    main()
