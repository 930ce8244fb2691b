"""Which experts are selected."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from moe_dist.config.expert_files import read_expert_config, read_summary
from moe_dist.errors import UserError
from moe_dist.methods.esft import least_used_experts, random_experts, select_experts
from tests.methods.esft import published


@published.needed
def test_published_scores_give_the_published_config():
    scores = read_summary(published.FOLDER / "intent_scores.json").scores["token"]
    config = read_expert_config(published.FOLDER / "intent_expert_config.json")
    assert len(config.experts) == 26
    assert select_experts(scores, p=0.2) == config.experts


@published.needed
def test_selection_runs_on_rounded_scores():
    """Scores that are not rounded give another set in one layer: the published ones are cut at four decimals."""
    ids, _, _ = published.routing()
    raw = {str(layer + 1): np.bincount(ids[layer].ravel(), minlength=64) / ids[layer].size for layer in range(26)}
    config = read_expert_config(published.FOLDER / "intent_expert_config.json").experts
    wrong = [layer for layer, chosen in select_experts(raw, p=0.2).items() if chosen != config[layer]]
    assert len(wrong) == 1


@published.needed
def test_dividing_over_layers_fails():
    """Negative control: counts divided by an expert's sum over layers, in place of the layer's sum over experts."""
    ids, _, _ = published.routing()
    counts_LE = np.stack([np.bincount(layer.ravel(), minlength=64) for layer in ids]).astype(float)
    wrong = counts_LE / counts_LE.sum(axis=0)
    config = read_expert_config(published.FOLDER / "intent_expert_config.json").experts
    selected = select_experts({str(layer + 1): wrong[layer].round(4) for layer in range(26)}, p=0.2)
    assert all(selected[layer] != config[layer] for layer in config)


def test_the_prefix_is_the_smallest_that_reaches_p():
    chance = random.Random(1)
    for _ in range(300):
        counts = [chance.choice([0, 1, 1, 5, chance.randint(0, 400)]) for _ in range(chance.randint(1, 64))]
        total, p = sum(counts) or 1, chance.choice([0.1, 0.2, 0.5, 1.0, chance.random()])
        scores = [count / total for count in counts]
        (chosen,) = select_experts({"3": scores}, p=p).values()
        order = sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert))
        assert chosen == order[: len(chosen)]
        exact = [Fraction(counts[expert], total) for expert in chosen]
        close = Fraction(1, 10**11)
        assert sum(exact) >= Fraction(p) - close or len(chosen) == sum(count > 0 for count in counts)
        assert sum(exact[:-1]) < Fraction(p) or not chosen


def test_sums_that_meet_p_exactly():
    assert select_experts({0: [0.1, 0.1, 0.1, 0.7]}, p=0.7) == {0: [3]}
    assert select_experts({0: [0.1, 0.1, 0.1]}, p=0.3) == {0: [0, 1, 2]}
    assert select_experts({0: [1 / 6] * 6}, p=0.5) == {0: [0, 1, 2]}
    assert select_experts({0: torch.tensor([0.1585, 0.0415, 0.8])}, p=1.0) == {0: [2, 0, 1]}
    assert select_experts({0: torch.tensor([0.1, 0.1, 0.05])}, p=0.2) == {0: [0, 1]}
    assert select_experts({0: [0.2001, 0.1999, 0.3]}, p=0.5001) == {0: [2, 0]}


def test_ties_zeros_and_more_than_there_is():
    assert select_experts({"a": [0.25, 0.5, 0.25, 0.0]}, p=0.75) == {"a": [1, 0]}
    assert select_experts({"a": [0.25, 0.5, 0.25, 0.0]}, p=1.0003) == {"a": [1, 0, 2]}
    assert select_experts({"a": [0.0, 0.0]}, p=0.2) == {"a": []}
    assert select_experts({"a": {"2": 0.5, "0": 0.5, "1": 0.0}}, p=0.6) == {"a": [0, 2]}
    assert select_experts({}, p=0.2) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_give_plain_ids_under_the_same_keys(dtype):
    selected = select_experts({7: torch.tensor([0.25, 0.625, 0.125], dtype=dtype), 2: np.array([0.5, 0.5])}, p=0.7)
    assert selected == {7: [1, 0], 2: [0, 1]}
    assert list(selected) == [7, 2]
    assert all(type(expert) is int for expert in selected[7])


def test_a_fraction_of_the_mass():
    gate = {1: [0.2, 0.1, 0.05, 0.05]}
    assert select_experts(gate, p=0.5) == {1: [0, 1, 2, 3]}
    assert select_experts(gate, p=0.5, p_mode="fraction_of_mass") == {1: [0]}
    assert select_experts({1: [300.0, 300.0, 100.0]}, p=6 / 7, p_mode="fraction_of_mass") == {1: [0, 1]}


def test_controls_have_the_same_counts():
    chance = random.Random(5)
    scores = {str(layer): [chance.random() for _ in range(16)] for layer in range(1, 5)}
    selected = select_experts(scores, p=3.0)
    drawn = random_experts(selected, dict.fromkeys(selected, 16), seed=3)
    least = least_used_experts(selected, scores)
    for layer, ids in selected.items():
        assert len(drawn[layer]) == len(least[layer]) == len(ids) > 0
        assert not set(drawn[layer]) & set(ids)
        assert set(drawn[layer]) <= set(range(16))
        assert least[layer] == sorted(range(16), key=lambda expert: scores[layer][expert])[: len(ids)]
    assert random_experts(selected, dict.fromkeys(selected, 16), seed=3) == drawn
    assert random_experts(selected, dict.fromkeys(selected, 16), seed=4) != drawn
    assert drawn["1"] != drawn["2"]


def test_a_random_draw_that_cannot_be_disjoint_takes_all_others():
    (drawn,) = random_experts({"1": [0, 1, 2]}, {"1": 4}, seed=0).values()
    assert len(set(drawn)) == 3
    assert 3 in drawn


def test_a_random_draw_is_the_same_in_all_versions():
    assert random_experts({"1": [0, 1], "2": [5]}, {"1": 8, "2": 8}, seed=7) == {"1": [2, 4], "2": [4]}


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({4: [0.1, math.nan]}, {}, "layer 4, expert 1"),
        ({4: [0.1, -0.5]}, {}, "at least 0"),
        ({4: ["x"]}, {}, "not a score"),
        ({4: [1.0]}, {"p": -0.1}, "p=-0.1"),
        ({4: [1.0]}, {"p": math.nan}, "p=nan"),
        ({4: [1.0]}, {"p": 2.0, "p_mode": "fraction_of_mass"}, "at most 1"),
        ({4: [1.0]}, {"p_mode": "relative"}, "p_mode"),
    ],
)
def test_nonsense_is_refused(scores, options, message):
    with pytest.raises(UserError, match=message):
        select_experts(scores, **options)
