"""Every ZeRO stage and expert-parallel size against one plain AdamW process: gradients, norms, weights, moments.

Buckets hold 300 elements, so that they are cut in the middle of layers. Each kind of problem meets every stage and
every expert-parallel size, and each stage every size.
"""

from __future__ import annotations

import functools

import pytest

from tests.reference import relative_error
from tests.train.runner import Case, assembled, compare, train, train_plain

WORLD = 4
SIZES = (1, 2, 4)
PROBLEMS = {
    "all": {},
    "some experts": {"trainable": [[1], [0, 4]]},
    "one rank only": {"trainable": [[0, 1], [0]]},
    "one layer only": {"trainable": [[], [0, 2, 3, 5]]},
    "no expert": {"trainable": [[], []]},
    "experts only": {"dense_trains": False, "trainable": [[0, 1], [3]]},
    "ranks without tokens": {"shunned": (3, 4, 5)},
    "empty batches": {"empty": (1, 2), "accumulation": 2, "trainable": [[1], [0, 4]]},
    "accumulation": {"accumulation": 2, "recompute": True, "evaluate": True},
    "tied": {"tied": True, "clip_norm": None},
}
CELLS = [
    (problem, stage, SIZES[(stage + index) % len(SIZES)])
    for index, problem in enumerate(PROBLEMS)
    for stage in range(4)
]


@functools.cache
def plain(problem: str) -> dict:
    case = Case(**PROBLEMS[problem])
    return train_plain(case, WORLD * case.accumulation)


@pytest.mark.parametrize(("problem", "stage", "ep"), CELLS)
def test_training_is_that_of_one_plain_process(ranks, problem, stage, ep):
    expected = plain(problem)
    results = ranks(WORLD, train, Case(ep=ep, stage=stage, **PROBLEMS[problem]), timeout=120)
    compare(results, expected)


def test_gradients_are_clipped_in_some_problems_and_not_in_others():
    norms = plain("all")["norms"]
    assert min(norms) > Case().clip_norm


@pytest.mark.parametrize("dense_trains", [True, False])
def test_bf16_is_the_same_at_every_stage(ranks, dense_trains):
    """Gradients are rounded to bf16 once, where a rank's backward makes them; from there on all sums are fp32.

    Expert parallelism changes what one backward sums, so only the order of magnitude is bound there.
    """
    case = {"precision": "bf16", "trainable": [[0, 1], [0, 4]], "accumulation": 2, "dense_trains": dense_trains}

    def run(ep: int, stage: int) -> dict:
        results = ranks(WORLD, train, Case(ep=ep, stage=stage, **case), 1, timeout=120)
        return {kind: assembled([result[kind] for result in results]) for kind in ("gradients", "weights")}

    alone, first = run(1, 0), run(2, 0)
    for kind in alone:
        for key, tensor in alone[kind].items():
            assert relative_error(first[kind][key], tensor) <= 1e-2, (kind, key)
    for stage in (1, 2, 3):
        found = run(2, stage)
        for kind in found:
            for key, tensor in first[kind].items():
                assert relative_error(found[kind][key], tensor) <= 1e-6, (stage, kind, key)
