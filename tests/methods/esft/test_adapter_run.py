"""The adapter of a training run, and the verbs: what comes out is what the run's exported model has."""

from __future__ import annotations

import json

import pytest
import torch

from moe_dist.cli.main import main
from moe_dist.config.expert_files import ExpertConfig, write_expert_config
from moe_dist.methods.esft.adapter_folder import MANIFEST
from tests.models.compare import file_tensors, same_bits
from tests.run.runs import make_files, settings, train

CASES = {
    # family: the experts, what else trains, how two ranks share the work besides ZeRO 2
    "qwen3_moe": ({"0": [5, 1], "1": [2]}, {}, {"pipeline": 2}),
    "qwen2_moe": ({"1": [4, 0]}, {"shared_experts": True, "non_expert_modules": True}, {"tensor": 2, "expert": 2}),
    "gpt_oss": ({"0": [3, 0, 1]}, {}, {"expert": 2}),
}


@pytest.mark.parametrize("family", CASES)
def test_the_adapter_of_a_run(ranks, tmp_path, capsys, family):
    experts, others, layout = CASES[family]
    files = make_files(tmp_path, family, dtype=torch.bfloat16)
    base, run = files / family, tmp_path / "run"
    write_expert_config(tmp_path / "experts.json", ExpertConfig(experts, **others))
    figures = {"kind": "token", "p": 0.2, "layers": {index: {"selected": len(ids)} for index, ids in experts.items()}}
    (tmp_path / "experts.selection.json").write_text(json.dumps(figures))
    tree = settings(
        files,
        run,
        family,
        train={"steps": 2, "precision": "bf16"},
        parallel={"zero_stage": 2, **layout},
        trainable={"experts_file": str(tmp_path / "experts.json")},
    )
    assert ranks(2, train, tree) == [0, 0]

    out = tmp_path / "adapter"
    with_record = ["--selection", str(tmp_path / "experts.selection.json")]
    assert main(["esft", "adapter", str(run), str(out), *with_record]) == 0
    assert "wrote the adapter of step 2" in capsys.readouterr().out
    assert json.loads((out / "expert_cfg.json").read_text())["experts"] == experts  # in the order of selection
    manifest = json.loads((out / MANIFEST).read_text())
    assert (manifest["step"], manifest["selection"], manifest["base"]["model"]) == (2, figures, str(base))
    assert manifest["base"]["fingerprint"].startswith("sampled:")
    assert (out / "tokenizer.json").exists()
    held = file_tensors(out)
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert manifest["bytes"] == sum(tensor.numel() * 2 for tensor in held.values())
    if not others:
        assert len(held) == sum(map(len, experts.values())) * (4 if family == "gpt_oss" else 3)

    assert main(["esft", "merge", str(out), str(tmp_path / "merged"), "--base", str(base)]) == 0
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    same_bits(file_tensors(tmp_path / "merged"), file_tensors(tmp_path / "exported"))
    assert any(not torch.equal(t, file_tensors(tmp_path / "merged")[key]) for key, t in file_tensors(base).items())
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()

    # Mistakes: exit code 2, and nothing written.
    write_expert_config(tmp_path / "other.json", ExpertConfig({"1": [1]}))
    (tmp_path / "other.selection.json").write_text('{"layers": {"1": {"selected": 1}}}')
    never = str(tmp_path / "never")
    wrong = [
        ["esft", "adapter", str(run), str(out)],
        ["esft", "adapter", str(tmp_path), never],
        ["esft", "adapter", str(run), never, "--selection", str(tmp_path / "other.selection.json")],
        ["esft", "adapter", str(run), never, "--selection", str(tmp_path / "other.json")],
        ["esft", "merge", str(run), never, "--base", str(base)],
        ["esft", "merge", str(out), never, "--base", str(tmp_path / "merged")],
        ["esft", "merge", str(out), str(out), never, "--base", str(base)],
    ]
    capsys.readouterr()
    for words in wrong:
        assert main(words) == 2, words
        assert capsys.readouterr().err.startswith("moe-dist: error:"), words
    assert not list(tmp_path.glob("*never*"))


def test_a_run_from_random_weights_has_no_base(tmp_path, capsys):
    files = make_files(tmp_path, "olmoe")
    tree = settings(files, tmp_path / "run", "olmoe", train={"steps": 1})
    config = json.loads((files / "olmoe" / "config.json").read_text())
    keep = {key: config[key] for key in ("model_type", "hidden_size", "intermediate_size", "num_experts", "vocab_size")}
    tree["model"] = {"config": {**keep, "num_hidden_layers": 1}, "tokenizer": str(files / "olmoe")}
    assert train(tree) == 0
    assert main(["esft", "adapter", str(tmp_path / "run"), str(tmp_path / "adapter")]) == 2
    assert "started from random weights" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()
