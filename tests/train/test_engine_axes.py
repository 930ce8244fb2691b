"""The engine over tensor-cut parameters and pipeline stages, at every ZeRO stage, against one plain process."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.reference import relative_error
from tests.train.axes import Case, train, train_plain
from tests.train.runner import assembled, compare

WORLD = 4
# Layouts (p, t, e) of four ranks: tensor without experts, the same groups for both, different ones, and with stages.
LAYOUTS = [(1, 2, 1), (1, 2, 2), (1, 2, 4), (1, 4, 2), (2, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 2)]
OUTSIDE = ("embed", "head", *(f"layers.{index}.{name}" for index in (0, 1) for name in ("mixer", "norm", "router")))
PROBLEMS = {
    "all": {"accumulation": 2},
    "tied": {"tied": True},
    "some experts": {"experts": ((1,), (0, 4)), "frozen": ("layers.0.mixer",)},
    "nothing cut trains": {"frozen": ("layers.0.mlp", "layers.1.mlp")},
    "cut tensors only": {"frozen": OUTSIDE, "experts": ((), ())},
    "a stage without any": {"frozen": ("head", "layers.1"), "experts": ((0, 1), ())},
}


def cells() -> list[tuple]:
    """Every layout meets every ZeRO stage, and every problem each of both in some cell."""
    chosen = [("all", layout, stage) for layout in LAYOUTS for stage in range(4)]
    rest = [problem for problem in PROBLEMS if problem != "all"]
    for number, problem in enumerate(rest):
        chosen += [(problem, LAYOUTS[(number + 3 * stage) % len(LAYOUTS)], stage) for stage in range(4)]
    chosen += [("tied", layout, stage) for layout, stage in (((2, 2, 1), 1), ((2, 1, 2), 2), ((2, 2, 2), 0))]
    chosen += [("a stage without any", layout, 2) for layout in ((2, 1, 1), (2, 2, 2))]
    return list(dict.fromkeys(chosen))


@functools.cache
def plain(problem: str, micro_batches: int) -> dict:
    return train_plain(Case(**PROBLEMS[problem]), micro_batches)


@pytest.mark.parametrize(("problem", "layout", "stage"), cells())
def test_training_is_that_of_one_plain_process(ranks, problem, layout, stage):
    p, t, e = layout
    case = Case(p=p, t=t, e=e, stage=stage, **PROBLEMS[problem])
    expected = plain(problem, WORLD // p * case.accumulation)
    results = ranks(WORLD, train, case, timeout=120)
    compare(results, expected)
    if case.tied and p > 1:
        copy, original = (results[rank]["parameters"] for rank in (WORLD - 1, 0))
        assert torch.equal(torch.from_numpy(copy["head.weight"]), torch.from_numpy(original["embed.weight"]))


@pytest.mark.parametrize("layout", [(1, 2, 4), (2, 2, 1)])
def test_bf16_is_the_same_at_every_stage(ranks, layout):
    """Gradients are rounded to bf16 once, where a rank's backward makes them; from there on all sums are fp32."""
    p, t, e = layout

    def run(stage: int) -> dict:
        case = Case(p=p, t=t, e=e, stage=stage, precision="bf16", tied=True, accumulation=2)
        results = ranks(WORLD, train, case, 1, timeout=120)
        return {kind: assembled([result[kind] for result in results]) for kind in ("gradients", "weights")}

    first = run(0)
    for stage in (1, 2, 3):
        found = run(stage)
        for kind in found:
            assert found[kind].keys() == first[kind].keys()
            for key, tensor in first[kind].items():
                assert relative_error(found[kind][key], tensor) <= 1e-6, (stage, kind, key)
