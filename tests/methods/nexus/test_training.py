"""Training a Nexus model over ranks, against one plain process; and a run that says who routes what where."""

from __future__ import annotations

import csv

import pytest
import torch

from moe_dist.cli.main import main
from moe_dist.config.schema import MoeSection
from moe_dist.models import load_model
from moe_dist.parallel.grid import Grid
from moe_dist.train.finished import export_run
from moe_dist.train.routing import Routing
from tests.methods.nexus.text import TOKENS, tokenizer, write_text
from tests.methods.nexus.tiny import nexus_folder
from tests.parity import distributed, plain
from tests.parity.cells import Cell
from tests.parity.test_parity import compare
from tests.run.runs import events, settings, train


def _cell(
    family="llama", layout=(1, 1), stage=1, trainable="all", balance="none", recompute=False, axes=(1, 1, 1)
) -> Cell:
    return Cell(f"nexus_{family}", layout, stage, trainable, 300, balance, recompute, axes=axes)


# The axes are covered by the matrix of tests/parity; here they meet each router and the families whose blocks differ.
CELLS = [
    ("prototype", _cell()),
    ("prototype", _cell(layout=(2, 2), balance="hf")),
    ("prototype", _cell(layout=(4, 4), stage=2, recompute=True)),
    ("prototype", _cell("qwen3", layout=(4, 2), stage=3, balance="hf")),
    ("paper", _cell("gemma", layout=(2, 2), stage=3)),
    ("paper", _cell("olmo2", layout=(4, 4), balance="hf")),
    ("linear", _cell("mistral", layout=(2, 1), stage=0)),
    ("linear", _cell("qwen2", layout=(4, 4), trainable="some", balance="hf")),
    # Pipeline, sequence, tensor.
    ("prototype", _cell(layout=(2, 2), balance="hf", axes=(1, 1, 2))),
    ("paper", _cell("qwen3", layout=(2, 1), stage=3, axes=(1, 2, 1))),
    ("prototype", _cell(layout=(2, 1), balance="hf", axes=(2, 1, 1))),
    ("linear", _cell("mistral", layout=(4, 2), stage=2, axes=(2, 1, 2))),
    # ESFT: one rank, and one layer, has nothing to train.
    ("prototype", _cell("gemma", layout=(4, 4), stage=2, trainable="one rank")),
    ("paper", _cell("mistral", layout=(2, 2), stage=3, trainable="one layer", balance="hf")),
]
# τ's gradient is one number, a sum of which most cancels: its relative error is the condition of that sum times that of
# its terms. These random models (seed by family and experts) are those where it is some twenty and not thousands.
SEEDS = {("llama", 4): 4, ("llama", 5): 7, ("qwen3", 4): 2, ("qwen3", 5): 4}


@pytest.mark.parametrize("experts", [4, 5])
@pytest.mark.parametrize(("router", "cell"), CELLS, ids=lambda value: str(value))
def test_parity_with_a_plain_process(ranks, tmp_path, router, cell, experts):
    """Outputs, every gradient, clip norm and the weights after three steps; 5 experts divide by no number of ranks."""
    family = cell.family.removeprefix("nexus_")
    made = {"router": router, "num_experts": experts, "seed": SEEDS.get((family, experts), 0)}
    folder = str(nexus_folder(family, tmp_path / "in", **made))
    compare(cell, ranks(cell.world, distributed.train, cell, folder, timeout=120), plain.train(cell, folder))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_tells_what_each_domain_s_tokens_get(ranks, tmp_path, precision):
    pytest.importorskip("matplotlib")
    files = write_text(tmp_path)
    nexus_folder("llama", tmp_path / "model", vocab_size=TOKENS, num_experts=3, expert_names=["code", "prose", "sums"])
    tokenizer().save_pretrained(tmp_path / "model")
    domains = {name: {"path": files[name]} for name in ("code", "prose", "sums")}
    tree = settings(
        tmp_path,
        tmp_path / "run",
        "model",
        data={"train": {"code": {**domains["code"], "weight": 3.0}, "sums": domains["sums"]}, "eval": domains},
        train={"eval_every": 3, "precision": precision},
        moe={"balance_loss": "layer_global", "balance_coef": 0.05},
        parallel={"expert": 2},
    )
    assert ranks(2, train, tree, timeout=120) == [0, 0]
    lines = events(tmp_path / "run", "eval")
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert set(line["domains"]) == {"code", "prose", "sums"}
        for figures in line["domains"].values():
            assert set(figures["experts"]) == {"0", "1"}
            for counts in figures["experts"].values():
                assert len(counts) == 3
                assert sum(counts) > figures["tokens"]  # every real token, the first of a document too
    last = lines[-1]["domains"]
    assert torch.tensor([last[name]["experts"]["0"] for name in last]).unique(dim=0).shape[0] == 3
    # And so does the page of the run, under the experts' own names.
    assert main(["inspect", str(tmp_path / "run"), "--out", str(tmp_path / "page")]) == 0
    header, *rows = csv.reader((tmp_path / "page" / "domain_routing.csv").open())
    assert header[1:] == ["code", "prose", "sums"]
    for name, *shares in rows:
        counts = torch.tensor([last[name]["experts"][layer] for layer in ("0", "1")]).double()
        assert torch.allclose(torch.tensor([*map(float, shares)]).double(), (counts / counts.sum(1, True)).mean(0))
    header, *rows = csv.reader((tmp_path / "page" / "domain_routing_2_sums.csv").open())
    assert header == ["step", "expert code", "expert prose", "expert sums"]
    assert [row[0] for row in rows] == ["3", "6"]
    # What comes out is a Nexus model again: the same domains, and trained weights.
    export_run(tmp_path / "run", tmp_path / "trained")
    before, after = load_model(tmp_path / "model"), load_model(tmp_path / "trained")
    assert after.config.expert_names == ["code", "prose", "sums"]
    for old, new in zip(before.model.layers, after.model.layers, strict=True):
        for (name, buffer), trained in zip(old.mlp.gate.named_buffers(), new.mlp.gate.buffers(), strict=True):
            assert torch.equal(buffer, trained), name
        for (name, weight), trained in zip(old.mlp.gate.named_parameters(), new.mlp.gate.parameters(), strict=True):
            assert not torch.equal(weight, trained), name


def test_one_expert_a_token_without_balance_loss_is_warned_of(tmp_path):
    """An expert without tokens has the gradient of that loss alone. With a frozen router it does not matter."""
    said = "an expert that gets no tokens has no gradient"

    def announced(folder, *, frozen: bool = False, **settings) -> bool:
        model = load_model(folder)
        for layer in model.model.layers:
            layer.mlp.gate.requires_grad_(not frozen)
        return said in " ".join(Routing(model, MoeSection(**settings), Grid.single()).announce())

    top_1 = nexus_folder("llama", tmp_path / "one")
    assert announced(top_1)
    assert announced(top_1, balance_loss="layer_global", balance_coef=0.0)
    assert not announced(top_1, balance_loss="layer_global", balance_coef=0.05)
    assert not announced(top_1, frozen=True)
    assert not announced(nexus_folder("llama", tmp_path / "two", num_experts_per_tok=2))
