"""Scores of a model at work: every family against the stock model, and a configured run on one and two ranks."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from moe_dist.config.expert_files import read_summary, write_summary
from moe_dist.config.load import build
from moe_dist.methods.esft.score import RoutingScores
from moe_dist.methods.esft.score_run import score_run
from moe_dist.models import load_model
from moe_dist.models.families import find_experts
from tests.models.tiny import CONFIGS, batch
from tests.run.runs import make_files, settings


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_against_the_stock_model(tiny, family):
    """Counts and weights are taken from the arguments of the stock experts modules, and added up in plain loops."""
    folder = tiny(family)
    ids = batch()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 8:] = False

    stock, seen = transformers.AutoModelForCausalLM.from_pretrained(folder), {}
    for name, module in find_experts(stock):
        index = name.split(".layers.")[1].split(".")[0]
        module.register_forward_pre_hook(lambda _, given, index=index: seen.__setitem__(index, given[1:3]))
    with torch.no_grad():
        stock(input_ids=ids)

    model = load_model(folder)
    with torch.no_grad(), RoutingScores(model) as listener:
        listener.see({"attention_mask": mask.long()})
        model(input_ids=ids)
    model(input_ids=ids)  # nobody listens any more
    summary = listener.summary()

    assert list(summary.scores["token"]) == list(seen)
    for layer, (chosen_TK, weights_TK) in seen.items():
        experts = len(summary.scores["token"][layer])
        counts, gates = [0] * experts, [0.0] * experts
        for token in mask.flatten().nonzero().flatten().tolist():
            for expert, weight in zip(chosen_TK[token].tolist(), weights_TK[token].tolist(), strict=True):
                counts[expert] += 1
                gates[expert] += weight
        tokens = int(mask.sum())
        assert summary.extra["token_counts"][layer] == counts
        assert summary.scores["gate"][layer] == pytest.approx([gate / tokens for gate in gates], abs=1e-6)
        assert summary.extra["gate_mass"][layer] == pytest.approx(sum(gates) / tokens, abs=1e-6)
    assert summary.extra["tokens"] == 20


def _score(tree: dict, options: dict):
    torch.manual_seed(0)
    return score_run(build(tree), **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("score"), "qwen3_moe")


def test_a_run_scores_alike_on_one_rank_and_on_two(files, ranks, tmp_path):
    tree = settings(files, tmp_path / "run", "qwen3_moe", train={"micro_batch_size": 2})
    alone = _score(tree, {"tokens": 200})
    extra = alone.extra
    assert 200 <= extra["tokens"] < 200 + 24
    assert extra["data"]["rows"] == extra["sequences"] < 14
    assert extra["model"]["fingerprint"].startswith("sampled:")
    assert not (tmp_path / "run").exists()

    tree["parallel"] = {**tree["parallel"], "expert": 2}
    for summary in ranks(2, _score, tree, {"tokens": 200}):
        assert summary.extra["token_counts"] == extra["token_counts"]
        assert {k: summary.extra[k] for k in ("tokens", "model", "data")} == {
            k: extra[k] for k in ("tokens", "model", "data")
        }
        for layer, scores in alone.scores["gate"].items():
            assert summary.scores["gate"][layer] == pytest.approx(scores, abs=1e-6)

    write_summary(tmp_path / "s.json", alone)
    official = json.loads((tmp_path / "s.json").read_text())
    assert set(official["token_scores"]["0"]) == {str(expert) for expert in range(7)}
    assert read_summary(tmp_path / "s.json").extra == alone.extra


def test_the_sample_ends_with_the_data_and_labels_may_count_alone(files, tmp_path):
    tree = settings(files, tmp_path / "run", "qwen3_moe")
    whole = _score(tree, {})
    labels = _score(tree, {"count_tokens": "labels_only", "score_norm": "per_sequence"})
    assert whole.extra["tokens"] < 131_072
    assert 0 < labels.extra["tokens"] <= whole.extra["tokens"]
    assert (labels.extra["count_tokens"], labels.extra["score_norm"]) == ("labels_only", "per_sequence")
