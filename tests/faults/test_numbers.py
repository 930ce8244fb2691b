"""What is not a number: whose data it was, and what a damaged model says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dist.data.loader import build_data
from moe_dist.errors import EXIT_OK
from tests.data.conftest import tokenizer, write_jsonl  # noqa: F401 - fixtures
from tests.data.test_loader import section  # noqa: F401 - a fixture
from tests.hang import scripted
from tests.hang.scripted import FULL, NAN_GRADIENT, NAN_LOSS
from tests.hang.test_hangs import files, run_settings  # noqa: F401 - a fixture among them
from tests.run.processes import write_config
from tests.run.runs import events, make_files, settings
from tests.run.test_bad_input import called, refused

PATIENCE = 240


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_fault_26_a_skipped_step_knows_its_rows(section, tokenizer, micro_batch):  # noqa: F811
    train = build_data(section(), tokenizer).train
    sizes, ranks, names = 8, 2, ["a", "b"]
    rows = dict(zip(names, train._rows, strict=True))
    train.next_batch(5)  # somewhere in the middle
    before = train.state_dict()
    drawn = train.drawn(before, sizes, micro_batch=micro_batch)
    assert train.state_dict() == before
    for rank in range(ranks):
        train.load_state_dict(before)
        batches = train.next_batch(sizes, rank=rank, ranks=ranks, micro_batch=micro_batch)
        for number, batch in enumerate(batches):
            said = drawn[number * ranks + rank]
            given = [torch.as_tensor(rows[name][row]["input_ids"]) for name, row in said]
            assert torch.equal(torch.stack(given), batch["input_ids"])


def test_fault_26_the_batches_of_a_skipped_step_are_named(ranks, files, tmp_path):  # noqa: F811
    steps = (FULL, NAN_LOSS, NAN_GRADIENT, FULL)
    tree = run_settings(files, tmp_path, (2, 1, "bf16"), steps)
    assert ranks(2, scripted.train, tree, steps, timeout=PATIENCE) == [EXIT_OK] * 2
    loss, gradient = events(tmp_path, "skipped")
    # Four rows a step, one a micro-batch: rank 1, whose loss was harmed, has the second and the fourth.
    assert loss["batches"] == [
        {"rank": 1, "micro_batch": 0, "loss_finite": False, "rows": [["script", 5]]},
        {"rank": 1, "micro_batch": 1, "loss_finite": False, "rows": [["script", 7]]},
    ]
    # A gradient has no name on it: all of the step.
    assert [one["rows"] for one in gradient["batches"]] == [[["script", row]] for row in (8, 10, 9, 11)]
    assert all(one["loss_finite"] for one in gradient["batches"])


def test_fault_39_a_model_with_a_nan_is_named(ranks, tmp_path):
    folder = make_files(tmp_path, "qwen3_moe") / "qwen3_moe"
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "experts.3.down_proj" in key)
    tensors[name].view(-1)[7] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    run = tmp_path / "run"
    words = ["train", str(write_config(settings(tmp_path, run, "qwen3_moe"), tmp_path / "c.yaml"))]
    (results,) = ranks(1, called, words, timeout=PATIENCE)
    refused(run, results[0], "model.safetensors", f"the tensor {name} holds a NaN")
