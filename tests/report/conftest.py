"""A real run to look at: a tiny model with frozen experts, stopped once and resumed, with two held-out domains."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from moe_dist.errors import EXIT_OK
from tests.cli.test_verbs import CONFIG, verbs

STEPS = 8


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of the run; for reading only."""
    from moe_dist.data.corpora import train_tokenizer

    folder = tmp_path_factory.mktemp("report")
    texts = [f"expert {number} takes the tokens of {number * 7} and gives them back" for number in range(60)]
    train_tokenizer(texts, vocab_size=320).save_pretrained(folder / "tokenizer")
    for name, lines in (("text.jsonl", texts), ("other.jsonl", texts[::-3])):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    config = {
        **CONFIG,
        "model": {**CONFIG["model"], "config": {**CONFIG["model"]["config"], "num_hidden_layers": 2}},
        "data": {**CONFIG["data"], "eval": {"held": "text.jsonl", "<b>other": "other.jsonl"}},
        "train": {**CONFIG["train"], "steps": STEPS, "eval_every": 2},
        "trainable": {"experts": {0: [1, 3], 1: [0]}},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    codes, _, err = verbs(folder, ["train", "c.yaml", "train.stop_at=5"], ["train", "c.yaml"])
    assert codes == [EXIT_OK, EXIT_OK], err
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that folder, to damage at will."""
    return shutil.copytree(trained, tmp_path / "run")


def lines(run) -> list[dict]:
    """What metrics.jsonl says."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
