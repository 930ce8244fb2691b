"""The verbs one after the other on a tiny model, as a user would call them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_dist.errors import EXIT_OK, EXIT_USER

REPOSITORY = Path(__file__).parents[2]
CONFIG = {
    "run": {"name": "tiny", "dir": "run"},
    "model": {
        "tokenizer": "./tokenizer",
        "config": {
            "model_type": "qwen3_moe",
            "vocab_size": 320,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 32,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
        },
    },
    "data": {"train": "text.jsonl", "eval": {"held": "text.jsonl"}, "seq_len": 32, "cache_dir": "cache"},
    "train": {"steps": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1, "lr": 0.01},
    "checkpoint": {"every": 2},
}

# One process for all verbs: importing transformers anew for each would take most of the time.
DRIVER = """
import json, sys
from moe_dist.cli.main import main
for words in json.loads(sys.argv[1]):
    print("code", main(words), flush=True)
"""


def verbs(folder, *calls):
    """(exit codes, stdout, stderr) of several command lines run in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(calls)],
        capture_output=True, text=True, cwd=folder, timeout=290,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(folder)},
    )  # fmt: skip
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("code ")]
    return codes, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from moe_dist.data.corpora import train_tokenizer

    folder = tmp_path_factory.mktemp("verbs")
    texts = [f"expert {number} takes the tokens of {number * 7} and gives them back" for number in range(60)]
    train_tokenizer(texts, vocab_size=320).save_pretrained(folder / "tokenizer")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def test_train_resume_evaluate_export(folder):
    codes, _, err = verbs(
        folder,
        ["train", "c.yaml", "train.stop_at=2"],
        ["--local_rank=0", "train", "c.yaml"],
        ["ckpt", "verify", "run"],
        ["eval", "run", "--json", "eval.json"],
        ["export", "run", "exported"],
        ["eval", "c.yaml", "run.dir=other", "model.config=null", "model.path=./exported", "--json", "exported.json"],
        ["train", "c.yaml", "train.lr=0.5"],
        ["train", "c.yaml", "--resume", "never"],
        ["export", "run", "exported"],
    )
    assert codes == [EXIT_OK] * 6 + [EXIT_USER] * 3, err
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line.get("event", line.get("kind")) == "train"] == [1, 2, 3, 4]
    assert (folder / "run" / "config.resolved.yaml").exists()
    ours, theirs = (json.loads((folder / name).read_text()) for name in ("eval.json", "exported.json"))
    assert ours["step"] == 4
    assert theirs["step"] is None
    mine, others = ours["domains"]["held"], theirs["domains"]["held"]
    assert mine.pop("experts") == others.pop("experts")
    assert mine == pytest.approx(others, rel=1e-6)
    assert "train.lr: 0.01 -> 0.5" in err
    assert "exported already exists" in err


def test_wrong_input_writes_nothing(folder):
    (folder / "torn.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    before = sorted(path.name for path in folder.iterdir())
    codes, _, err = verbs(
        folder,
        ["train", "c.yaml", "run.dir=new", "parallel.expert=2"],
        ["train", "c.yaml", "run.dir=new", "data.train=torn.jsonl"],
        ["train", "c.yaml", "run.dir=new", "model.config.model_type=nothing_moe"],
        ["train", "c.yaml", "run.dir=new", "model.config=null", "model.path=./tokenizer"],
        ["train", "c.yaml", "run.dir=new", "trainable.experts={7: [0]}"],
    )
    assert codes == [EXIT_USER] * 5, err
    assert "parallel.expert=2 needs at least 2 ranks, but this run has 1" in err
    assert "torn.jsonl:2" in err
    assert "nothing_moe" in err
    assert "Traceback" not in err
    assert sorted({path.name for path in folder.iterdir()} - {"cache"}) == sorted(set(before) - {"cache"})


def test_dry_run_needs_no_weights_data_or_network(folder):
    codes, out, err = verbs(
        folder,
        ["train", "c.yaml", "run.dir=dry", "--dry-run", "--ranks", "4", "parallel.expert=2"],
        ["train", "c.yaml", "run.dir=dry", "--dry-run", "model.config=null", "model.path=some/model"],
        ["train", "c.yaml", "run.dir=dry", "--dry-run", "model.config=null", "model.path=./nowhere"],
    )
    assert codes == [EXIT_OK, EXIT_OK, EXIT_USER], err
    assert "expert-data 2 x expert 2" in out
    assert "model.path=./nowhere: no such folder" in err
    assert not (folder / "dry").exists()
