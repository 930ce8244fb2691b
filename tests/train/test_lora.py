"""Training with LoRA: every gradient and the weights after three steps as PEFT on one process has them."""

from __future__ import annotations

import pytest
import torch

from tests.reference import relative_error
from tests.train import lora_problem
from tests.train.lora_problem import Case
from tests.train.runner import assembled

GRADIENTS, NORMS, WEIGHTS = 2e-6, 2e-6, 1e-5

CASES = [
    Case("llama", stage=0),
    Case("llama", stage=3, recompute=True),
    Case("gemma", world=2, stage=1),
    Case("qwen2", world=2, stage=2, targets=("q_proj", "v_proj")),
    Case("qwen3", world=2, stage=3),
    Case("olmo2", world=4, stage=2, recompute=True),
    Case("mistral", world=4, stage=3),
    Case("llama", world=4, stage=0),
    Case("qwen3", world=2, stage=1, sequence=2),
    Case("llama", world=4, stage=3, sequence=2, recompute=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_with_plain_peft(ranks, tmp_path, case):
    folder = lora_problem.folder_of(case, tmp_path / "base")
    results = ranks(case.world, lora_problem.ours, case, folder, timeout=90)
    expected = lora_problem.plain(case, folder)
    for kind, tolerance in (("gradients", GRADIENTS), ("weights", WEIGHTS)):
        found = assembled([result[kind] for result in results])
        assert found.keys() == expected[kind].keys()
        for key, wanted in expected[kind].items():
            assert wanted.any()
            error = relative_error(found[key], wanted)
            assert error < tolerance, f"{kind} of {key}: {error:.2e}"
    for result in results:
        assert relative_error(torch.tensor(result["norms"]), torch.tensor(expected["norms"])) < NORMS


def test_bf16_is_the_same_at_every_stage_and_near_plain_peft(ranks, tmp_path):
    """A rank's backward rounds gradients to bf16, once; from there on all sums are fp32, and so are the masters.

    ZeRO 3 puts a linear product of DeepSpeed in the place of torch's, which rounds otherwise: as far as plain PEFT is.
    """
    cases = [Case("llama", world, stage, "bf16") for world, stage in ((1, 0), (2, 1), (2, 2), (2, 3))]
    folder = lora_problem.folder_of(cases[0], tmp_path / "base")
    first, *exact, third = (
        assembled([result["gradients"] for result in ranks(case.world, lora_problem.ours, case, folder, timeout=90)])
        for case in cases
    )
    for found in exact:
        assert max(relative_error(found[key], first[key]) for key in first) < GRADIENTS
    expected = lora_problem.plain(cases[0], folder)["gradients"]
    for found in (first, third):
        assert max(relative_error(found[key], wanted) for key, wanted in expected.items()) < 0.03
