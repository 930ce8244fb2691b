"""Random numbers go on as if nothing had happened, through JSON."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from moe_dist.checkpoint import CheckpointError, restore_rng_state, rng_state


@pytest.fixture(autouse=True)
def _keep_state():
    state = rng_state()
    yield
    restore_rng_state(state)


def draw():
    return (
        [random.random(), random.gauss(0, 1), random.randrange(1 << 40)],
        np.random.standard_normal(3).tolist(),
        torch.randn(5).tolist(),
    )


@pytest.mark.parametrize("between", [0, 1], ids=["fresh", "a gauss value is waiting"])
def test_the_same_numbers_follow(between):
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    for _ in range(between):
        random.gauss(0, 1)
        np.random.standard_normal(1)
    text = json.dumps(rng_state())
    first = draw()
    draw()
    restore_rng_state(json.loads(text))
    assert draw() == first


@pytest.mark.parametrize("key", ["python", "numpy", "torch", "cuda"])
def test_a_state_that_lacks_a_part_is_an_error(key):
    state = rng_state()
    del state[key]
    with pytest.raises(CheckpointError, match="damaged"):
        restore_rng_state(state)
