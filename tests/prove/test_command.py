"""`moe-dist prove` as it is typed: its ranks, its exit codes, its certificate."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import yaml

from moe_dist.cli.main import main
from moe_dist.errors import EXIT_OK, EXIT_USER
from moe_dist.train import state
from tests.models.tiny import CONFIGS
from tests.mutants.faults import FAULTS

SETTINGS = {
    "model": {"config": {"model_type": "qwen3_moe", **CONFIGS["qwen3_moe"]}, "tokenizer": "offline"},
    "data": {"train": [{"corpus": "docstrings"}], "seq_len": 32},
    "parallel": {"reduce_bucket_size": 300},
    "moe": {"balance_loss": "layer_global"},
    "train": {"global_batch_size": 8},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "run": {"dir": str(tmp_path / "run")}}))
    return path


def certificate_in(folder) -> dict:
    return json.loads((folder / "certificate.json").read_text())


def test_a_proof_on_two_ranks_that_it_starts_itself(config, tmp_path, capfd):
    words = ["prove", str(config), "--ranks", "2", "parallel.expert=2", "parallel.zero_stage=2"]
    assert main([*words, "--timeout", "240"]) == EXIT_OK
    said = capfd.readouterr().out
    assert said.count("PROVED") == 1
    assert "in float32" in said  # the config says bf16
    written = certificate_in(tmp_path / "run-proof")
    assert written["holds"] is True
    names = ["logits", "chosen experts", "backward", "gradients", "loss", "evaluation", "clip norm", "weights"]
    names += ["frozen", "resume"]
    names += ["bf16 statistics", "bf16 gradients, dense", "bf16 gradients, expert"]
    assert [check["name"] for check in written["checks"]] == names
    assert len(written["gradients"]) == len(written["weights"]) > 30
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run-proof" / "work").exists()


def test_what_is_off_is_named_with_its_layer(config, tmp_path, capsys):
    words = ["prove", str(config), "--out", str(tmp_path / "proof"), "--keep"]
    with FAULTS["router detached"].planted():
        assert main(words) == 1
    said = capsys.readouterr().out
    assert "NOT PROVED: gradients off, worst at model.layers." in said
    assert "gate.weight" in said
    written = certificate_in(tmp_path / "proof")
    assert written["holds"] is False
    assert next(check["name"] for check in written["checks"] if not check["holds"]) == "gradients"
    assert (tmp_path / "proof" / "work" / "model" / "config.json").is_file()


def test_what_broke_off_is_not_proved(config, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "save", mock.Mock(side_effect=RuntimeError("no disk")))
    with pytest.raises(RuntimeError, match="no disk"):
        main(["prove", str(config), "--out", str(tmp_path / "proof")])
    written = certificate_in(tmp_path / "proof")
    assert written["holds"] is False
    assert written["verdict"] == "NOT PROVED: it ended after 4 checks, which hold"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers", "0,7"], "the model has the layers 0 to 1"),
        (["--layers", "first"], "numbers of layers"),
        (["--ranks", "0"], "at least 1"),
        (["--ranks", "3", "parallel.expert=2"], "parallel.expert=2"),
        (["parallel.world_size=2", "--ranks", "4"], "parallel.world_size=2"),
    ],
)
def test_bad_input(config, tmp_path, capsys, words, said):
    assert main(["prove", str(config), *words]) == EXIT_USER
    assert said in capsys.readouterr().err
