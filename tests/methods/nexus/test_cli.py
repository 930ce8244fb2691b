"""The Nexus verbs as a user calls them, one after the other, and what they say to mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moe_dist.config.load import load
from moe_dist.errors import EXIT_OK, EXIT_USER, UserError
from moe_dist.methods.nexus.config import load_config
from moe_dist.parallel.grid import layout
from moe_dist.train.build import plan_model
from moe_dist.train.dry_run import describe
from tests.cli.test_verbs import verbs
from tests.methods.nexus.text import TOKENS, seed_folder, write_text
from tests.methods.nexus.tiny import dense_folder

SHIPPED = Path(__file__).parents[3] / "configs" / "nexus"
OLD = ("python", "prose", "sums")  # `verbs` reads lines that begin with "code"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_text(folder)
    (folder / "empty.jsonl").write_text('{"text": ""}\n')
    seed_folder("llama", folder / "seed")
    for number, name in enumerate((*OLD, "new"), start=1):
        dense_folder("llama", folder / name, seed=number, vocab_size=TOKENS)
    for file, names in (("nexus.yaml", OLD), ("new.yaml", ("new",))):
        tree = {
            "nexus": {"seed": "./seed", "experts": {name: f"./{name}" for name in names}, "documents": 6},
            "data": {
                "train": {name: {"path": "code.jsonl" if name == "python" else f"{name}.jsonl"} for name in names},
                "seq_len": 16,
                "cache_dir": "cache",
            },
        }
        (folder / file).write_text(yaml.safe_dump(tree))
    return folder


def test_from_dense_models_to_a_served_one(folder):
    codes, said, errors = verbs(
        folder,
        ["nexus", "embed", "nexus.yaml", "--out", "old.safetensors"],
        ["nexus", "upcycle", "nexus.yaml", "up", "nexus.domains=old.safetensors"],
        ["nexus", "embed", "new.yaml", "--out", "new.safetensors", "nexus.same_space_as=old.safetensors"],
        ["nexus", "extend", "new.yaml", "more", "nexus.model=./up", "nexus.domains=new.safetensors"],
        ["nexus", "remove", "more", "prose", "fewer"],
        ["nexus", "export", "more", "served"],
        # The same again, and mistakes: nothing is written.
        ["nexus", "upcycle", "nexus.yaml", "up", "nexus.domains=old.safetensors"],
        ["nexus", "upcycle", "nexus.yaml", "bad1", "nexus.domain=old.safetensors"],
        ["nexus", "upcycle", "nexus.yaml", "bad2", "nexus.experts.python=./nowhere"],
        ["nexus", "embed", "new.yaml", "--out", "bad3"],
        ["nexus", "remove", "more", "law", "bad4"],
        [
            "nexus",
            "extend",
            "new.yaml",
            "bad5",
            "nexus.model=./up",
            "nexus.domains=new.safetensors",
            "data.train={new: {path: empty.jsonl}}",
        ],
        ["nexus", "grow"],
    )
    assert codes == [EXIT_OK] * 6 + [EXIT_USER] * 7, errors
    for part in (
        "embedder seed:sampled:", "copy of expert python: model.layers.{l}.mlp.up_proj.weight",
        "measured: each block is MLP_seed(x)", "router row of new: length over that of the others 1.00",
        "share of new (its own domain) before any step", "remove prose", "export as qwen2_moe", "wrote served",
    ):  # fmt: skip
        assert part in said, part
    for part in (
        "up already exists and is not empty", "did you mean nexus.domains?", "nexus.experts.python=./nowhere: no such",
        "name at least two domains", "has no expert 'law'; it has prose, python, sums, new", "unknown verb",
        "empty.jsonl:1: the document is empty",
    ):  # fmt: skip
        assert part in errors, part
    assert not list(folder.glob("bad*"))
    assert not list(folder.glob(".building*"))


def test_the_shipped_configurations_are_right():
    with pytest.raises(UserError, match=r"nexus\.seed=\./models/seed: no such folder"):
        load_config(SHIPPED / "nexus.yaml")
    hub = [f"nexus.experts.{name}=owner/{name}" for name in ("python_code", "docstrings", "prose")]
    config = load_config(SHIPPED / "nexus.yaml", ["nexus.seed=owner/seed", *hub])
    assert list(config.nexus.experts) == [source.name for source in config.data.train]
    train = load(SHIPPED / "train.yaml", ["model.path=owner/upcycled"])
    assert (train.moe.balance_loss, train.moe.balance_coef) == ("layer_global", 0.05)
    assert (train.train.lr, train.train.min_lr_ratio) == (1e-3, 0.3)


@pytest.mark.parametrize(("size", "experts", "tokens", "total"), [("470m", 6, 25e9, 1.3e9), ("2.8b", 4, 40e9, 9.1e9)])
def test_the_papers_recipes_have_its_numbers(size, experts, tokens, total):
    config = load(SHIPPED / f"paper-{size}.yaml")
    train = config.train
    assert (train.lr, train.schedule, train.min_lr_ratio) == (1e-3, "cosine", 0.3)
    assert train.warmup_steps == pytest.approx(train.steps / 10, abs=1)
    assert train.steps * train.global_batch_size * config.data.seq_len == pytest.approx(tokens, rel=1e-4)
    assert (config.moe.balance_loss, config.moe.balance_coef) == ("layer_global", 0.05)
    model = config.model.config
    assert (model["router"], model["num_experts"], model["num_experts_per_tok"]) == ("paper", experts, 1)
    text = describe(config, 8)
    assert f"{train.steps} steps, cosine" in text
    whole = plan_model(load(SHIPPED / f"paper-{size}.yaml", ["parallel.expert=1"]), layout(1, expert=1)).skeleton
    assert sum(parameter.numel() for parameter in whole.parameters()) == pytest.approx(total, rel=0.05)
