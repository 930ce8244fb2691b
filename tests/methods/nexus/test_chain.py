"""Upcycle, train, extend, train: on 1, 2 and 4 expert-parallel ranks it is one and the same course of training."""

from __future__ import annotations

import json

import pytest

from moe_dist.config.schema import DataSection, Source
from moe_dist.methods.nexus.config import NexusConfig, NexusSection
from moe_dist.methods.nexus.domains import embed
from moe_dist.methods.nexus.extend import extend
from moe_dist.methods.nexus.upcycle import upcycle
from moe_dist.train.finished import export_run
from tests.methods.nexus.text import TOKENS, documents, seed_folder, tokenizer, write_text
from tests.methods.nexus.tiny import dense_folder
from tests.models.compare import distance, file_tensors
from tests.run.runs import events, settings, train

OLD = ("code", "prose", "sums", "new")
LAST = "last"  # the fifth


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    files = write_text(folder)
    files[LAST] = str(folder / "last.jsonl")
    mixed = [" ".join(pair) for pair in zip(documents("new"), documents("sums"), strict=True)]
    (folder / "last.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in mixed))
    seed_folder("llama", folder / "seed")
    for number, name in enumerate((*OLD, LAST), start=1):
        dense_folder("llama", folder / name, seed=number, vocab_size=TOKENS)
    return folder, files


def _nexus(place, names, **section) -> NexusConfig:
    folder, files = place
    data = DataSection([Source(path=files[name], name=name) for name in names], seq_len=16, cache_dir=str(folder / "c"))
    experts = {name: str(folder / name) for name in names}
    return NexusConfig(data, NexusSection(**{"seed": str(folder / "seed"), "experts": experts, **section}))


def _courses(ranks, place, out, model: str, names) -> dict[int, tuple[list, dict]]:
    """{ranks: (lines of training and evaluation, exported weights)} of the model in that folder."""
    folder, files = place
    tokenizer().save_pretrained(folder / model)
    sources = {name: {"path": files[name], "weight": 1.0 + (name == LAST)} for name in names}
    found = {}
    for world in (1, 2, 4):
        run = out / f"{model}-{world}"
        tree = settings(
            folder, run, model,
            data={"train": sources, "eval": sources},
            # One micro-batch a step: the balance loss is a mean over micro-batches of something that is not linear.
            train={"steps": 4, "eval_every": 2, "micro_batch_size": 4 // world, "eps": 1e-6},
            moe={"balance_loss": "layer_global", "balance_coef": 0.05},
            parallel={"expert": world, "zero_stage": (0, 1, 3)[world // 2]},
        )  # fmt: skip
        assert ranks(world, train, tree, timeout=120) == [0] * world
        export_run(run, out / f"{model}-{world}-out")
        found[world] = events(run, "train", "eval"), file_tensors(out / f"{model}-{world}-out")
    return found


def _same(courses: dict[int, tuple[list, dict]]) -> None:
    lines, weights = courses[1]
    for world in (2, 4):
        for ours, alone in zip(courses[world][0], lines, strict=True):
            if ours["event"] == "train":
                assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-6)
                assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
                assert ours["layers"] == alone["layers"]
            else:
                for name, figures in alone["domains"].items():
                    assert ours["domains"][name]["experts"] == figures["experts"]
                    assert ours["domains"][name]["loss"] == pytest.approx(figures["loss"], rel=1e-6)
        for key, tensor in weights.items():
            assert distance(courses[world][1][key], tensor) < 1e-5, (world, key)


def test_four_experts_then_five_on_one_two_and_four_ranks(ranks, place, tmp_path):
    folder, _ = place
    embed(_nexus(place, OLD)).write(folder / "old.safetensors")
    upcycle(_nexus(place, OLD, domains=str(folder / "old.safetensors")), folder / "four")
    before = _courses(ranks, place, tmp_path, "four", OLD)
    _same(before)

    same = {"same_space_as": str(folder / "old.safetensors")}
    embed(_nexus(place, (LAST,), **same)).write(folder / "last.safetensors")
    trained = {"model": str(tmp_path / "four-2-out"), "domains": str(folder / "last.safetensors")}
    extend(_nexus(place, (LAST,), **trained), folder / "five")
    after = _courses(ranks, place, tmp_path, "five", (*OLD, LAST))
    _same(after)
    assert all(len(figures["experts"]["0"]) == 5 for figures in after[4][0][-1]["domains"].values())
