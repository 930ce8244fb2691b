"""The experts' back end of a run: named, or measured, recorded, and taken again when the run goes on."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from moe_dist.config.load import build
from moe_dist.errors import UserError
from moe_dist.models import moe_layers
from moe_dist.moe import fastest
from moe_dist.ops import grouped_mlp, native
from moe_dist.ops.grouped_mlp import BACKENDS
from moe_dist.parallel.grid import Grid
from moe_dist.train import backends, loop
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.run_folder import EXPERTS_BACKEND
from tests.run.runs import assert_same_bits, events, make_files, settings, stored

STEPS = 4
BARE = {"loop", "grouped", "batched"} | ({"native"} if native.has_cpu() else set())

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"), "qwen3_moe", "gpt_oss")


def tree(files: Path, run: Path, backend: str, *, family: str = "qwen3_moe", world: int = 1, stop: int = STEPS, **more):
    train = {"steps": STEPS, "stop_at": stop, "micro_batch_size": 2, **more}
    parallel = {"expert": world, "zero_stage": 1}
    return settings(files, run, family, train=train, parallel=parallel, moe={"experts_backend": backend})


def record(run: Path) -> dict:
    return json.loads((run / EXPERTS_BACKEND).read_text())


def run_noting(tree: dict, fast: str | None = None) -> tuple[int, set[str], int, str]:
    """On each rank: the exit code of a run, the back ends that its layers were given, how many measurements this rank
    has made, and what it printed. fast: the one that every measurement finds to be the fastest."""
    measured, used, said = [], set(), io.StringIO()
    measure, forward = fastest._interleaved, grouped_mlp.forward

    def measuring(steps, seconds):
        found = measure(steps, seconds)
        measured.append(found)
        return {name: 0.0 if name == fast else value for name, value in found.items()} if fast else found

    def noting(*args, **options):
        if options.get("backend") is not None and not inside:
            used.add(options["backend"])
        return forward(*args, **options)

    inside: list[bool] = []
    choose = loop.choose_backends

    def choosing(*args):
        inside.append(True)
        line = choose(*args)
        inside.clear()
        return line

    with (
        mock.patch.object(fastest, "_interleaved", measuring),
        mock.patch.object(grouped_mlp, "forward", noting),
        mock.patch.object(loop, "choose_backends", choosing),
        contextlib.redirect_stdout(said),
    ):
        code = loop.train(build(tree))
    return code, used, len(measured), said.getvalue()


@pytest.mark.parametrize("world", [1, 2])
def test_measured_once_and_taken_again(ranks, files, tmp_path, world):
    """A run in two pieces takes the same course to the bit as one in one piece that measures nothing."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    first = ranks(world, run_noting, tree(files, parted, "measured", world=world, stop=2), "loop", timeout=120)
    assert [result[:2] for result in first] == [(0, {"loop"})] * world
    assert [result[2] for result in first] == [1] + [0] * (world - 1)  # two layers of one shape, on rank 0
    assert first[0][3].count("experts' back end: loop (2 layers), measured in ") == 1
    kept = record(parted)
    assert [layer["backend"] for layer in kept["layers"].values()] == ["loop"] * 2
    ((measured),) = kept["measured"]
    assert {"loop", "grouped"} <= measured["milliseconds"].keys() <= BARE
    assert measured["shape"]["rows"] == 2 * 24 * 2
    assert measured["shape"]["trainable"] == (7 if world == 1 else 4)

    # Were it to measure again, it would find another one.
    then = ranks(world, run_noting, tree(files, parted, "measured", world=world), "grouped", timeout=120)
    assert [result[:3] for result in then] == [(0, {"loop"}, 0)] * world
    assert "experts' back end: loop (2 layers), as measured before the first step" in then[0][3]
    assert record(parted) == kept

    named = ranks(world, run_noting, tree(files, whole, "loop", world=world), timeout=120)
    assert [result[:3] for result in named] == [(0, {"loop"}, 0)] * world
    assert not (whole / EXPERTS_BACKEND).exists()
    assert_same_bits(stored(parted, STEPS), stored(whole, STEPS))
    assert events(parted, "train") == events(whole, "train")


def test_stages_measure_their_own_layers_and_know_all(ranks, tmp_path):
    files = make_files(tmp_path, "deepseek_v2", num_hidden_layers=3)  # the first layer is dense: the first stage's
    config = tree(files, tmp_path / "run", "measured", family="deepseek_v2", stop=2)
    config["parallel"] = {"pipeline": 3}
    first = ranks(3, run_noting, config, "loop", timeout=120)
    assert [result[0] for result in first] == [0] * 3
    assert [result[2] for result in first] == [0, 1, 1]
    assert "experts' back end: loop (2 layers), measured in " in first[0][3]
    assert record(tmp_path / "run")["layers"].keys() == {f"model.layers.{index}.mlp.experts" for index in (1, 2)}
    config["train"] = {**config["train"], "stop_at": 3}
    config["parallel"] = {}
    (then,) = ranks(1, run_noting, config, "grouped", timeout=120)
    assert then[:3] == (0, {"loop"}, 0)


def test_what_does_not_fit_is_measured_again(ranks, files, tmp_path):
    ranks(1, run_noting, tree(files, tmp_path / "run", "measured", stop=1), "loop", timeout=120)
    results = ranks(1, run_noting, tree(files, tmp_path / "run", "measured", stop=2, micro_batch_size=1), "grouped")
    assert results[0][:3] == (0, {"grouped"}, 1)
    assert record(tmp_path / "run")["measured"][0]["shape"]["rows"] == 24 * 2


def test_overwriting_a_run_removes_what_it_has_measured(files, tmp_path):
    config = build(tree(files, tmp_path / "run", "auto", stop=1))
    loop.train(config)
    (tmp_path / "run" / EXPERTS_BACKEND).write_text("{}")
    loop.train(config, overwrite=True)
    assert not (tmp_path / "run" / EXPERTS_BACKEND).exists()


@pytest.mark.parametrize("text", ["{", "{}", '{"layers": {"a": {"backend": "loop"}}}'])
def test_a_damaged_record(files, tmp_path, text):
    config = build(tree(files, tmp_path / "run", "measured", stop=1))
    loop.train(config)
    (tmp_path / "run" / EXPERTS_BACKEND).write_text(text)
    with pytest.raises(UserError, match=EXPERTS_BACKEND):
        loop.train(config)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_named_one_reaches_the_layers(files, tmp_path, name):
    config = build(tree(files, tmp_path, name))
    model = build_model(config, plan_model(config, Grid.single()), Grid.single())
    assert {layer.backend for _, layer in moe_layers(model)} == {name}


def test_one_that_cannot_compute_the_experts_is_refused_before_anything_is_written(files, tmp_path):
    said = (
        r"experts_backend=native .*layers\.0\.mlp\.experts here .*biases, float32.* auto, measured, loop, grouped, bat"
    )
    with pytest.raises(UserError, match=said):
        loop.train(build(tree(files, tmp_path / "run", "native", family="gpt_oss")))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="experts_backend"):
        build(tree(files, tmp_path / "run", "fastest"))


def test_a_model_that_does_not_say_how_many_experts_a_token_has(files, tmp_path):
    config = build(tree(files, tmp_path, "measured"))
    skeleton = plan_model(config, Grid.single()).skeleton
    backends.check_backend(config, skeleton)
    with mock.patch.object(backends, "TOP_K", ()), pytest.raises(UserError, match="how many experts a token has"):
        backends.check_backend(config, skeleton)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_is_measured(files, tmp_path, family):
    """Each that serves, by its own passes; half of the experts frozen; no random state is touched."""
    config = build(tree(files, tmp_path, "auto", family=family))
    config.trainable.experts = {"0": [0, 1], "1": []}
    model = build_model(config, plan_model(config, Grid.single()), Grid.single())
    layers = {
        fastest.shape_of(layer, dtype=torch.bfloat16, rows=rows): layer
        for (_, layer), rows in zip(moe_layers(model), (64, 0), strict=True)
    }
    assert [shape.trainable for shape in layers] == [2, 0]
    before = torch.get_rng_state()
    found, none = fastest.measure(layers).values()
    assert torch.equal(torch.get_rng_state(), before)
    assert none == {}
    assert {"loop"} <= found.keys() <= BARE
    assert ("native" in found) == (native.has_cpu() and family == "qwen3_moe")
    assert all(0 < value < 10_000 for value in found.values())
