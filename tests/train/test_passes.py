"""A step's passes through pipeline stages against one process: gradients, losses, evaluation, and what travels."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from moe_dist.config.load import build
from moe_dist.parallel.grid import Grid, build_grid
from moe_dist.parallel.traffic import count_traffic
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.engine import build_engine
from moe_dist.train.evaluate import held_out
from moe_dist.train.losses import count_labels
from moe_dist.train.passes import run_forwards, run_passes
from moe_dist.train.routing import Routing
from moe_dist.train.skipped import suspects
from tests.models.tiny import VOCAB, make_folder
from tests.reference import relative_error
from tests.train.runner import assembled, packed

LENGTH, HIDDEN = 12, 32
LAYERS = {"num_hidden_layers": 4}
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Case:
    """A step of `micro_batches`, each of a row of each of `data` ranks."""

    family: str = "qwen3_moe"
    axes: dict = field(default_factory=lambda: {"pipeline": 2})
    micro_batches: int = 3
    data: int = 1
    stage: int = 1
    moe: dict = field(default_factory=dict)
    precision: str = "fp32"
    model: dict = field(default_factory=dict)

    @property
    def world(self) -> int:
        product = self.data
        for name, size in self.axes.items():
            product *= 1 if name == "expert" else size
        return product


HF = {"balance_loss": "hf", "balance_coef": 0.05, "z_loss_coef": 0.01}
CASES = {
    "one micro-batch": Case(micro_batches=1, moe=HF),
    "as many as stages": Case("mixtral", micro_batches=2, moe=HF, model={"tie_word_embeddings": True}, stage=0),
    "dense first layers": Case("deepseek_v2", micro_batches=4, moe=HF, model={"first_k_dense_replace": 2}),
    "fewer than stages": Case("mixtral", {"pipeline": 4}, micro_batches=3, moe=HF, stage=2),
    "four stages": Case("deepseek_v2", {"pipeline": 4}, micro_batches=5, moe=HF, model={"tie_word_embeddings": True}),
    "rows of two ranks": Case("deepseek_v2", data=2, stage=2, moe=HF),
    "experts of two ranks": Case(axes={"pipeline": 2, "expert": 2}, data=2, stage=0, moe=HF),
    "each layer, all ranks": Case(data=2, moe={**HF, "balance_loss": "layer_global"}),
    "each layer, by sequence": Case(
        "mixtral", {"pipeline": 2, "expert": 2}, data=2, stage=3, moe={**HF, "balance_loss": "layer_sequence"}
    ),
    "each layer, by rank": Case("mixtral", moe={**HF, "balance_loss": "layer_micro"}),
    "cut rows": Case(axes={"pipeline": 2, "sequence": 2, "expert": 2}, moe=HF),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(case: Case) -> str:
        key = (case.family, *sorted(case.model.items()))
        if key not in made:
            place = tmp_path_factory.mktemp(case.family)
            made[key] = str(make_folder(case.family, place, **{**LAYERS, **case.model}))
        return made[key]

    return get


def row(number: int) -> dict[str, torch.Tensor]:
    """A row of two documents and padding, with few labels or many."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, VOCAB, (1, LENGTH), generator=generator)
    place, real = torch.arange(LENGTH), LENGTH - number % 4
    cut = 3 + number % 5
    return {
        "input_ids": ids,
        "labels": torch.where((place >= number % 7) & (place < real), ids, -100),
        "attention_mask": (place < real).long().unsqueeze(0),
        "position_ids": torch.where(place < cut, place, torch.where(place < real, place - cut, place - real))[None],
    }


def batches_of(case: Case, grid: Grid) -> list[dict]:
    """The micro-batches of a rank; one process has the rows of all data ranks in each."""
    mine = range(case.data) if grid.world == 1 else [grid.data_rank]
    return [
        {
            name: torch.cat([row(number * case.data + rank)[name] for rank in mine])
            for name in ("input_ids", "labels", "attention_mask", "position_ids")
        }
        for number in range(case.micro_batches)
    ]


def engine_of(case: Case, folder: str, axes: dict):
    config = build(
        {
            "run": {"dir": "unused"},
            "model": {"path": folder, "dtype": "float32", "attention": "eager"},
            "data": {"train": ["unused.jsonl"]},
            "moe": case.moe,
            "parallel": {**axes, "zero_stage": case.stage},
            "train": {"precision": case.precision},
        }
    )
    grid = build_grid(**axes)
    model = build_model(config, plan_model(config, grid), grid)
    engine = build_engine(
        model,
        grid,
        zero_stage=case.stage,
        precision=case.precision,
        eps=1e-6,
        accumulation_steps=case.micro_batches,
        reduce_bucket_size=300,
    )
    return engine, Routing(model, config.moe, grid), grid


def run(case: Case, folder: str, axes: dict) -> dict:
    """Two steps on the same rows, then an evaluation on them."""
    engine, routing, grid = engine_of(case, folder, axes)
    batches = batches_of(case, grid)
    labels = sum(count_labels(row(number)["labels"]) for number in range(case.micro_batches * case.data))
    result: dict = {"losses": [], "norms": []}
    for _ in range(2):
        routing.start_step()
        with count_traffic() as traffic:
            passes = run_passes(engine, routing, batches, labels=labels, grid=grid)
        result["losses"].append(passes.loss_sum.item())
        result.setdefault("gradients", packed(engine.gradients()))
        result["norms"].append(engine.step(1e-3).grad_norm)
        routing.end_step(skipped=False)
    result["figures"] = routing.figures()
    result["bytes"] = [traffic.bytes(name) for name in ("activations", "activation gradients")]
    result["stage"] = grid.pipeline_rank

    def losses(some):
        return run_forwards(engine.forward, engine.module, routing, some, grid)

    result["held"] = held_out(losses, engine.module, iter(batches), grid)
    engine.close()
    return result


def close(found: float, expected: float) -> bool:
    return abs(found - expected) <= TOLERANCE * abs(expected)


@pytest.mark.parametrize("name", CASES)
def test_stages_do_what_one_process_does(ranks, folders, name):
    case = CASES[name]
    folder = folders(case)
    (alone,) = ranks(1, run, case, folder, {})
    results = ranks(case.world, run, case, folder, case.axes, timeout=120)
    found, expected = assembled([result["gradients"] for result in results]), assembled([alone["gradients"]])
    assert found.keys() == expected.keys()
    errors = {key: relative_error(found[key], gradient) for key, gradient in expected.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < TOLERANCE, f"gradient of {worst}: {errors[worst]:.2e}"
    for step in range(2):
        assert close(sum(result["losses"][step] for result in results), alone["losses"][step])
    for result in results:
        assert all(map(close, result["norms"], alone["norms"]))
        assert result["figures"]["layers"] == alone["figures"]["layers"]
        assert result["held"]["experts"] == alone["held"]["experts"]
        assert result["held"]["tokens"] == alone["held"]["tokens"]
        assert close(result["held"]["loss"], alone["held"]["loss"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pipeline_alone_changes_no_bit(ranks, folders, precision):
    """Hidden states and their gradients travel as they are, also past an engine that multiplies its loss."""
    case = Case("mixtral", precision=precision, stage=2, moe={"z_loss_coef": 0.01})
    (alone,) = ranks(1, run, case, folders(case), {})
    results = ranks(2, run, case, folders(case), case.axes)
    expected = assembled([alone["gradients"]])
    for key, gradient in assembled([result["gradients"] for result in results]).items():
        assert torch.equal(gradient, expected[key]), key
    assert results[1]["losses"] == alone["losses"]
    assert results[0]["losses"] == [0.0, 0.0]


def test_what_travels_is_counted(ranks, folders):
    case = Case("mixtral", {"pipeline": 4}, micro_batches=5, moe=HF)
    one = LENGTH * HIDDEN * 4 + 5 * 8  # hidden states, and a load of 5 experts
    for result in ranks(4, run, case, folders(case), case.axes):
        sends = [one * case.micro_batches * there for there in (result["stage"] < 3, result["stage"] > 0)]
        assert result["bytes"] == sends


def spoiled(folder: str, axes: dict) -> dict:
    """A step in which the second row of the second data rank has a loss that is not finite."""
    case = Case("mixtral", micro_batches=2, data=2, stage=0)
    engine, routing, grid = engine_of(case, folder, axes)
    before = {name: tensor.clone() for name, tensor in engine.full_parameters()}
    batches = batches_of(case, grid)
    routing.start_step()
    head = engine.module.get_output_embeddings()
    calls = []

    def spoil(module, inputs, output):
        calls.append(1)
        return output * float("nan") if grid.data_rank == 1 and len(calls) == 2 else output

    if grid.is_last_stage:
        head.register_forward_hook(spoil)
    passes = run_passes(engine, routing, batches, labels=20, grid=grid)
    result = engine.step(1e-3)
    names = [[("text", 2 * number + rank)] for number in range(2) for rank in range(2)]
    same = all(torch.equal(tensor, before[name]) for name, tensor in engine.full_parameters())
    engine.close()
    return {"skipped": result.skipped, "same": same, "suspects": suspects(passes.finite, names, grid)}


def test_a_loss_that_is_not_finite_skips_the_step_on_all_stages(ranks, folders):
    for result in ranks(4, spoiled, folders(Case("mixtral")), {"pipeline": 2}):
        assert result["skipped"]
        assert result["same"]
        assert result["suspects"] == [{"rank": 1, "micro_batch": 1, "loss_finite": False, "rows": [["text", 3]]}]
