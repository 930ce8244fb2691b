"""Fixtures of the tests of Self-MoE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.methods.self_moe.tiny_base import PROMPTS, make_base, make_seeds


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A base model that writes lists of tasks and answers in the form of its seeds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return make_base(tmp_path_factory.mktemp("base"))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def generation(base, tmp_path):
    """Write the configuration of a small generation; changes go into its section `generate`."""
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    for skill in ("echo", "twice"):
        make_seeds(tmp_path / f"{skill}.jsonl", skill)

    def write(**changes) -> Path:
        import yaml

        section = {
            "model": str(base),
            "seeds": {skill: str(tmp_path / f"{skill}.jsonl") for skill in ("echo", "twice")},
            "prompts": {skill: str(tmp_path / "prompts.yaml") for skill in ("echo", "twice")},
            "count": 12,
            "batch_size": 4,
            "instruction_tokens": 128,
            "response_tokens": 24,
            **changes,
        }
        path = tmp_path / "generate.yaml"
        path.write_text(yaml.safe_dump({"generate": section}))
        return path

    return write


@pytest.fixture
def one_thread():
    """As the ranks have: sums in another order are other sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batches(monkeypatch):
    """What the model was asked: (prompts, sampling) of every batch."""
    from moe_dist.methods.self_moe.generation.local_model import LocalModel

    asked, complete = [], LocalModel.complete

    def spy(self, prompts, sampling, **options):
        asked.append((prompts, sampling))
        return complete(self, prompts, sampling, **options)

    monkeypatch.setattr(LocalModel, "complete", spy)
    return asked
