"""A loss or a gradient that is no number on one rank of an axis: the step is skipped by all, and nothing else is."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch.distributed as dist

from moe_dist.errors import EXIT_OK
from tests.hang import scripted
from tests.hang.scripted import FEW, FULL, HARMED, INF_GRADIENT, NAN_GRADIENT, NAN_LOSS, PADDING
from tests.run.runs import assert_same_bits, events, make_files, same_bits, settings, stored

STEPS = (FULL, NAN_LOSS, PADDING, NAN_GRADIENT, FULL, INF_GRADIENT, FEW)
LAYOUTS = {
    "stages": {"pipeline": 2, "zero_stage": 1},
    "slices": {"sequence": 2, "expert": 2, "zero_stage": 2},
    "parts": {"tensor": 2, "expert": 2, "zero_stage": 0},
}


class OneSlice(scripted.Script):
    """What is wrong is so on one rank of those that share rows; the last pipeline stage is the one with a loss."""

    def next_batch(self, size: int, **place) -> list[dict]:
        batches = super().next_batch(size, **place)
        self.rank, self.last_rank = dist.get_rank() % 2, 1
        return batches


def train(tree: dict, steps: tuple[str, ...]) -> int | str:
    """On each rank: a run over these steps."""
    stages = tree["parallel"].get("pipeline", 1) > 1
    with patch.object(scripted, "Script", scripted.Script if stages else OneSlice):
        return scripted.train(tree, steps)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_skipped_on_all_ranks(ranks, tmp_path, layout):
    files = make_files(tmp_path, "deepseek_v3")
    tree = settings(
        files,
        tmp_path / "run",
        "deepseek_v3",
        parallel=LAYOUTS[layout],
        moe={"expert_bias_rate": 1e-3, "balance_loss": "hf"},
        train={"steps": len(STEPS), "global_batch_size": 2},
        checkpoint={"every": 1, "keep": 20},
    )
    assert ranks(2, train, tree, STEPS, timeout=120) == [EXIT_OK] * 2
    run = tmp_path / "run"
    skipped = [number for number, kind in enumerate(STEPS, 1) if kind in HARMED]
    lines = events(run, "skipped")
    assert [line["step"] for line in lines] == skipped
    found = [[batch["loss_finite"] for batch in line["batches"]] for line in lines]
    assert [all(finite) for finite in found] == [False, True, True], lines
    after = {number: stored(run, number) for number in range(1, len(STEPS) + 1)}
    for number in list(after)[1:]:
        if number in skipped:
            assert_same_bits(after[number], after[number - 1])
        else:
            moved = [key for key in after[number] if not same_bits(after[number][key], after[number - 1][key])]
            assert {key[1].split(".")[2] for key in moved if "layers" in key[1]} == {"0", "1"}, STEPS[number - 1]
    assert {line["step"]: line["loss"] for line in events(run, "train")}[STEPS.index(PADDING) + 1] == 0.0
