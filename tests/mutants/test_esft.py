"""Faults planted in ESFT: each makes one of its acceptance checks fail, which passes without it.

A check is called as check(ranks, folder of a tiny model, an empty path).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_dist.models.surgery import moe_layers
from tests.methods.esft import test_adapter as adapter
from tests.methods.esft import test_bytes as bytes_
from tests.methods.esft import test_counting as counting
from tests.methods.esft import test_gradient_flow as flow
from tests.methods.esft import test_parity as parity
from tests.methods.esft import test_precision as precision
from tests.methods.esft import test_select as select
from tests.models.tiny import make_folder
from tests.mutants.fault import Fault
from tests.mutants.planting import Case, Planting


def scores_divided_over_layers(original):
    """The published code's: by a sum over layers, here of one layer alone, in place of the sum over experts."""
    return lambda self, norm="per_token": original(self, norm) / original(self, norm).clamp(min=1e-9)


def selection_short_of_one(original):
    def chosen(scores, p=0.2, **options):
        return {layer: ids[:-1] for layer, ids in original(scores, p=p, **options).items()}

    return chosen


def selection_long_by_one(original):
    def chosen(scores, p=0.2, **options):
        found = original(scores, p=p, **options)
        return {layer: [*ids, *[e for e in range(99) if e not in ids][:1]] for layer, ids in found.items()}

    return chosen


def control_draws_from_the_selected(original):
    return lambda selected, num_experts, *, seed: {layer: list(ids) for layer, ids in selected.items()}


def input_always_requires_grad(original):
    """Every layer takes part in the backward, and frozen experts keep what it needs."""

    def forward(self, hidden_TH, ids_TK, weights_TK):
        if not hidden_TH.requires_grad:
            hidden_TH = hidden_TH.detach().requires_grad_()
        return original(self, hidden_TH, ids_TK, weights_TK)

    return forward


def frozen_experts_decay(original):
    def step(self, lr):
        result = original(self, lr)
        with torch.no_grad():
            for _, layer in moe_layers(self.module):
                if layer.frozen is not None:
                    for parameter in layer.frozen.parameters():
                        parameter.mul_(1 - lr * 0.1)
        return result

    return step


def masters_rounded_to_bf16(original):
    def step(self, lr):
        result = original(self, lr)
        with torch.no_grad():
            for piece in self._backend.held:
                piece.flat.copy_(piece.flat.bfloat16())
        return result

    return step


def frozen_experts_have_state(original):
    """All experts are put into the trainable span, and the frozen ones' gradients would be masked."""
    return lambda model, grid, **options: original(model, grid, **{**options, "trainable": None})


def adapter_experts_exchanged(original):
    """An adapter has the first expert's weights under the last one's name, and the other way round."""
    return lambda self, tensor, value: original(self, tensor._replace(expert={0: 6, 6: 0}[tensor.expert]), value)


MODELS, TRAIN, ESFT = "moe_dist.models", "moe_dist.train", "moe_dist.methods.esft"
CASES = {
    "scores divided over layers": Case(
        Fault(f"{ESFT}.counting:ExpertCounter.token_scores", scores_divided_over_layers),
        lambda ranks, folder, _: counting.test_sums("per_token"),
    ),
    "selection short of one": Case(
        Fault("tests.methods.esft.test_select:select_experts", selection_short_of_one),
        lambda ranks, folder, _: select.test_the_prefix_is_the_smallest_that_reaches_p(),
    ),
    "selection long by one": Case(
        Fault("tests.methods.esft.test_select:select_experts", selection_long_by_one),
        lambda ranks, folder, _: select.test_the_prefix_is_the_smallest_that_reaches_p(),
    ),
    "control of selected experts": Case(
        Fault("tests.methods.esft.test_select:random_experts", control_draws_from_the_selected),
        lambda ranks, folder, _: select.test_controls_have_the_same_counts(),
    ),
    "backward below the lowest layer": Case(
        Fault("moe_dist.moe.layer:MoEExperts.forward", input_always_requires_grad),
        lambda ranks, folder, _: flow.test_every_rank_exchanges_as_often_and_no_more_than_needed(ranks, folder, 2),
    ),
    "frozen rows kept": Case(
        Fault("moe_dist.moe.layer:MoEExperts.forward", input_always_requires_grad),
        lambda ranks, folder, _: flow.test_rows_are_kept_for_the_trainable_span_alone(ranks, folder),
    ),
    "frozen experts decay": Case(
        Fault(f"{TRAIN}.engine:Engine.step", frozen_experts_decay),
        lambda ranks, folder, _: parity.test_gradients_and_weights_are_those_of_one_process_and_frozen_bytes_stay(
            ranks, folder, parity.CELLS[5]
        ),
    ),
    "masters in bf16": Case(
        Fault(f"{TRAIN}.engine:Engine.step", masters_rounded_to_bf16),
        lambda ranks, folder, path: precision.test_masters_move_and_bf16_weights_alone_do_not(
            precision.initialised(path / "model")
        ),
    ),
    "state of frozen experts": Case(
        Fault(f"{MODELS}.cut:swap", frozen_experts_have_state),
        lambda ranks, folder, _: bytes_.test_bytes_of_optimizer_and_gradients(ranks, folder, 2, 1, "fp32"),
    ),
    "adapter's experts exchanged": Case(
        Fault(f"{ESFT}.adapter_names:AdapterNames.split", adapter_experts_exchanged),
        lambda ranks, folder, path: adapter.test_there_and_back_to_the_bit(
            lambda family, dtype: Path(folder), path, "qwen3_moe", torch.float32
        ),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_folder("qwen3_moe", tmp_path_factory.mktemp("esft"), num_hidden_layers=3))


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_caught(ranks, folder, tmp_path, name):
    case = CASES[name]
    with case.fault.planted(), pytest.raises(AssertionError):
        case.check(Planting(ranks, case.fault), folder, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_the_check_passes_without_it(ranks, folder, tmp_path, name):
    CASES[name].check(ranks, folder, tmp_path)
