"""What must be equal to the bit: state moved between layouts, a resumed run, a skipped step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.train.runner import FAULTS, Case, assembled, load_and_return, partitions, resumed, steps_with, train

WORLD = 4
KINDS = ("weights", "exp_avg", "exp_avg_sq")
TRAINABLE = [[0, 1, 4], [2]]


def whole(results: list[dict]) -> dict:
    return {kind: assembled([result[kind] for result in results]) for kind in KINDS}


def assert_same(found: dict, expected: dict) -> None:
    for kind in KINDS:
        assert found[kind].keys() == expected[kind].keys()
        for key, tensor in expected[kind].items():
            assert torch.equal(found[kind][key], tensor), (kind, key)


def assert_parameters_follow(results: list[dict], state: dict, precision: str) -> None:
    """The model's own parameters are the masters, rounded."""
    for (name, expert), master in state["weights"].items():
        rounded = master.bfloat16().float() if precision == "bf16" else master
        for result in results if expert < 0 else ():
            assert np.array_equal(result["parameters"][name].ravel(), rounded.numpy()), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_moves_between_stages_and_sizes(ranks, precision):
    case = {"precision": precision, "trainable": TRAINABLE}
    results = ranks(WORLD, train, Case(ep=1, stage=0, **case), timeout=120)
    first = whole(results)
    assert {expert for name, expert in first["weights"] if name.startswith("layers.0.experts.")} == {0, 1, 4}
    assert any(tensor.any() for tensor in first["exp_avg"].values())
    state = first
    for ep, stage in ((2, 1), (4, 2), (1, 3), (4, 0), (2, 3), (4, 1), (1, 2), (4, 3), (1, 0)):
        results = ranks(WORLD, load_and_return, Case(ep=ep, stage=stage, **case), state, 3, timeout=120)
        state = whole(results)
        assert_same(state, first)
        assert_parameters_follow(results, state, precision)
        assert {result["adam_step"] for result in results} == {3}


def test_state_goes_to_fewer_ranks_and_back(ranks):
    case = {"trainable": TRAINABLE}
    first = whole(ranks(WORLD, train, Case(ep=4, stage=2, **case), timeout=120))
    for world, ep, stage in ((1, 1, 1), (2, 2, 3), (4, 2, 1)):
        results = ranks(world, load_and_return, Case(ep=ep, stage=stage, **case), first, 3, timeout=120)
        assert_same(whole(results), first)


def test_expert_parameters_follow_their_masters(ranks):
    first = whole(ranks(WORLD, train, Case(ep=1, stage=1, trainable=TRAINABLE), timeout=120))
    for stage in (0, 2, 3):
        case = Case(ep=2, stage=stage, trainable=TRAINABLE)
        results = ranks(WORLD, load_and_return, case, first, 3, timeout=120)
        seats = {0: (0, 1), 1: (4, None)}  # contiguous halves of six experts: 0, 1 train on rank 0, 4 on rank 1
        for rank, result in enumerate(results):
            stack = result["parameters"]["layers.0.experts.trainable.down_proj"]
            for seat, expert in enumerate(seats[rank % 2]):
                expected = 0 if expert is None else first["weights"]["layers.0.experts.down_proj", expert].numpy()
                assert np.array_equal(stack[seat].ravel(), np.broadcast_to(expected, stack[seat].size)), (rank, seat)


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_resumed_run_is_the_uninterrupted_one(ranks, stage, precision):
    case = Case(ep=2, stage=stage, precision=precision, trainable=TRAINABLE, accumulation=2)
    for expected, found in ranks(WORLD, resumed, case, timeout=120):
        assert found["adam_step"] == expected["adam_step"] == 3
        for kind in KINDS:
            for (*where, tensor), (*here, again) in zip(expected[kind], found[kind], strict=True):
                assert where == here
                assert np.array_equal(tensor, again), (kind, where)
        for name, tensor in expected["parameters"].items():
            assert np.array_equal(tensor, found["parameters"][name]), name


@pytest.mark.parametrize(
    ("stage", "precision", "fault"),
    [
        (0, "fp32", "loss is nan"),
        (1, "fp32", "loss alone is inf"),
        (2, "fp32", "gradient alone is nan"),
        (3, "fp32", "loss is nan"),
        (3, "bf16", "loss alone is inf"),
        (0, "bf16", "gradient alone is nan"),
        (1, "bf16", "loss is nan"),
        (2, "bf16", "loss alone is inf"),
    ],
)
def test_a_bad_step_never_happened(ranks, stage, precision, fault):
    """One rank's first micro-batch of step 1 is bad: nobody moves, and step 2 is as if there had been no step 1."""
    case = Case(ep=2, stage=stage, precision=precision, trainable=TRAINABLE, accumulation=2)
    spoilt = ranks(WORLD, steps_with, case, {1: fault}, timeout=120)
    without = ranks(WORLD, steps_with, case, {}, (1,), timeout=120)
    for bad, good in zip(spoilt, without, strict=True):
        assert bad["skipped"] == [False, True, False]
        assert bad["counted"] == (3, 1)
        assert bad["norms"][2] == good["norms"][1]
        before, after, end = bad["states"]
        assert after["adam_step"] == before["adam_step"] == 1
        for one, other in ((before, after), (end, good["states"][1])):
            for kind in KINDS:
                for (*where, tensor), (*_, again) in zip(one[kind], other[kind], strict=True):
                    assert np.array_equal(tensor, again), (kind, where)
            for name, tensor in one["parameters"].items():
                assert np.array_equal(tensor, other["parameters"][name]), name


def test_every_kind_of_fault_is_covered():
    assert set(FAULTS) == {"loss is nan", "loss alone is inf", "gradient alone is nan"}


def test_zero_3_cuts_experts_over_their_replicas_only(ranks):
    """Frozen and trainable experts over the two ranks that hold them, everything else over all four."""
    for sizes in ranks(WORLD, partitions, Case(ep=2, stage=3, trainable=TRAINABLE), timeout=120):
        for name, (whole_numel, kept) in sizes.items():
            assert kept == -(-whole_numel // (2 if ".experts." in name else 4)), name
        assert "layers.1.experts.frozen.gate_up_proj" in sizes
