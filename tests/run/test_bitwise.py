"""The same to the last bit: the same run again, a run with a stop in it, and a checkpoint carried over topologies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.run.runs import assert_same_bits, carry_over, events, make_files, settings, stored, train, trainer_state

STEPS, STOP = 6, 3
FIGURES = ("train", "eval", "skipped")
PATIENCE = 600  # seconds for one run, on a machine that may be busy with other work

pytestmark = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Cell:
    family: str
    world: int
    expert: int
    stage: int
    precision: str
    balance: str
    way: str = "auto"  # of the tokens to their experts; "node": every rank is taken for a node of its own

    def __str__(self) -> str:
        layout = f"ranks{self.world}-ep{self.expert}-zero{self.stage}"
        return f"{self.family}-{layout}-{self.precision}-{self.balance}-{self.way}"


# Every stage in both precisions, under expert parallelism and without.
CELLS = (
    Cell("qwen3_moe", 2, 1, 0, "bf16", "layer_global"),
    Cell("deepseek_v3", 2, 2, 0, "fp32", "none", "alltoall"),
    Cell("deepseek_v3", 2, 2, 1, "bf16", "layer_global"),
    Cell("qwen3_moe", 2, 1, 1, "fp32", "hf"),
    Cell("deepseek_v3", 2, 2, 2, "fp32", "layer_global", "node"),
    Cell("qwen3_moe", 2, 1, 2, "bf16", "layer_sequence"),
    Cell("deepseek_v3", 2, 2, 3, "bf16", "layer_global"),
    Cell("deepseek_v3", 2, 1, 3, "fp32", "layer_micro"),
    Cell("deepseek_v3", 4, 2, 3, "fp32", "layer_global"),
    Cell("qwen3_moe", 1, 1, 2, "bf16", "none"),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe", "deepseek_v3")


def cell_settings(cell: Cell, files: Path, run: Path, **train_section) -> dict:
    return settings(
        files,
        run,
        cell.family,
        data={"eval": {"held": {"path": str(files / "text.jsonl"), "limit": 8}}},
        parallel={"expert": cell.expert, "zero_stage": cell.stage, "node_size": 1 if cell.way == "node" else None},
        moe={
            "dispatcher": cell.way,
            "balance_loss": cell.balance,
            "z_loss_coef": 1e-3 if cell.balance == "layer_global" else 0.0,
            "expert_bias_rate": 1e-2 if cell.family == "deepseek_v3" else 0.0,
        },
        train={"steps": STEPS, "precision": cell.precision, "eval_every": STOP, **train_section},
    )


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_stop_and_a_resume_change_no_bit(ranks, files, tmp_path, cell):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    runs = (
        (cell_settings(cell, files, whole), {}),
        (
            cell_settings(cell, files, parted, stop_at=STOP),
            cell_settings(cell, files, parted),
        ),
    )
    for tree in (runs[0][0], *runs[1]):
        assert set(ranks(cell.world, train, tree, timeout=PATIENCE)) == {0}
    assert_same_bits(stored(parted, STEPS), stored(whole, STEPS))
    assert trainer_state(parted, STEPS) == trainer_state(whole, STEPS)
    assert events(parted, *FIGURES) == events(whole, *FIGURES)
    assert [line["step"] for line in events(whole, "train")] == list(range(1, STEPS + 1))
    assert [line["step"] for line in events(whole, "eval")] == [STOP, STEPS]
    assert len({line["loss"] for line in events(whole, "train")}) == STEPS


@pytest.mark.parametrize("cell", [CELLS[2], CELLS[6]], ids=str)
def test_the_same_run_twice(ranks, files, tmp_path, cell):
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        assert set(ranks(cell.world, train, cell_settings(cell, files, folder), timeout=PATIENCE)) == {0}
    assert_same_bits(*(stored(folder, STEPS) for folder in folders))
    assert events(folders[0], *FIGURES) == events(folders[1], *FIGURES)


def test_weights_and_moments_carry_over_topologies(ranks, files, tmp_path):
    # Experts that train are spread unevenly, so that spans have empty seats and ZeRO cuts through experts.
    chosen = {"include": ["*"], "experts": {"1": [1, 3, 6]}}
    shared = {"trainable": chosen, "moe": {"expert_bias_rate": 1e-2}}
    tree = settings(files, tmp_path / "run", "deepseek_v3", train={"steps": 2}, **shared)
    assert ranks(1, train, tree, timeout=PATIENCE) == [0]
    first, source = stored(tmp_path / "run", 2), tmp_path / "run" / "checkpoints" / "step-2"
    assert all(tensor.any() for (kind, *_), tensor in first.items() if kind != "buffers")
    hops = ((2, 2, 3, "fp32"), (4, 4, 2, "fp32"), (4, 2, 1, "bf16"), (2, 2, 0, "bf16"), (1, 1, 3, "fp32"))
    for number, (world, expert, stage, precision) in enumerate(hops):
        parallel = {"expert": expert, "zero_stage": stage, "reduce_bucket_size": 500}
        tree = settings(
            files, tmp_path / "run", "deepseek_v3", parallel=parallel, train={"precision": precision}, **shared
        )
        folder = tmp_path / f"hop{number}"
        ranks(world, carry_over, tree, source, folder / "checkpoints", timeout=PATIENCE)
        assert_same_bits(stored(folder, 2), first)
        assert trainer_state(folder, 2) == trainer_state(tmp_path / "run", 2)
        source = folder / "checkpoints" / "step-2"
