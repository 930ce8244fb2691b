"""The planner's memory against the measured peak of live tensor bytes, in real training steps on gloo ranks.

    python -m benchmarks.plan_memory [--json FILE] [--full]

Each case trains three steps of two micro-batches with a real DeepSpeed engine, on rows of two documents. Measured is
the most bytes of storages alive in the third step, on the rank that has most of them; "ours" is what `moe-dist plan`
says for the same configuration, from shapes alone. The exit status is 1 where one is off by more than 5 %. --full takes
every combination of precision, ZeRO stage and expert size on 2 ranks as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist

from benchmarks._harness import Missed, row, run
from benchmarks._plan_runs import STEPS, config, measure
from benchmarks._ranks import on_ranks
from moe_dist.config.checks import accumulation
from moe_dist.planner.search import layout_of
from moe_dist.planner.study import Study

GOAL = 0.05
MB = 1e6

CASES: dict[str, tuple[int, dict]] = {
    "1 rank, ZeRO 1, bf16": (1, {}),
    "2 ranks, expert 2, ZeRO 0, fp32, recompute": (
        2,
        {"expert": 2, "zero_stage": 0, "precision": "fp32", "recompute": True},
    ),
    "2 ranks, expert 2, ZeRO 1, bf16": (2, {"expert": 2}),
    "2 ranks, ZeRO 2, bf16": (2, {"zero_stage": 2}),
    "2 ranks, expert 2, ZeRO 2, fp32": (2, {"expert": 2, "zero_stage": 2, "precision": "fp32"}),
    "2 ranks, ZeRO 3, bf16": (2, {"zero_stage": 3}),
    "2 ranks, tensor 2, expert 2, ZeRO 1, bf16": (2, {"tensor": 2, "expert": 2}),
    "2 ranks, sequence 2, expert 2, ZeRO 1, fp32": (2, {"sequence": 2, "expert": 2, "precision": "fp32"}),
    "2 ranks, pipeline 2, ZeRO 1, bf16": (2, {"pipeline": 2, "micro_batches": 4}),
    "2 ranks, DeepSeek-V3, expert 2, ZeRO 1, fp32, recompute": (
        2,
        {"family": "deepseek_v3", "expert": 2, "precision": "fp32", "recompute": True},
    ),
    "4 ranks, pipeline 2, tensor 2, expert 2, ZeRO 1, bf16": (
        4,
        {"pipeline": 2, "tensor": 2, "expert": 2, "micro_batches": 4},
    ),
}


def main() -> None:
    run("plan_memory", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict]:
    off = []
    cases = dict(CASES)
    if full:
        for precision in ("fp32", "bf16"):
            for stage in range(4):
                for expert in (1, 2):
                    name = f"2 ranks, expert {expert}, ZeRO {stage}, {precision}"
                    cases[name] = 2, {"expert": expert, "zero_stage": stage, "precision": precision}
    for name, (world, changes) in cases.items():
        for line in on_ranks(world, _case, name, world, changes):
            if abs(1 - line["ratio"]) > GOAL:
                off.append(f"{name}: {1 / line['ratio']:.3f} of what was measured")
            yield line
    if off:
        raise Missed("more than 5 % off: " + "; ".join(off))


def _case(name: str, world: int, changes: dict) -> Iterator[dict]:
    peak = most(changes, world)
    if dist.get_rank() == 0:
        yield row(name, planned(changes, world) / MB, peak / MB, "measured peak of live tensors", unit="MB")


def most(changes: dict, world: int, *, steps: int = STEPS) -> int:
    """The measured peak of the rank that has most. Collective."""
    settings = config(world, **changes)
    peaks: list = [None] * world
    dist.all_gather_object(peaks, measure(settings, accumulation(settings, world), steps=steps)["peak"])
    return max(peaks)


def planned(changes: dict, world: int) -> int:
    settings = config(world, **changes)
    return Study(settings, device="cpu").memory(layout_of(settings, world, node_size=world)).total


if __name__ == "__main__":
    main()
