"""After training: the exported folder holds the masters, rounded once, and is the model that was trained."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional as F

from moe_dist.config.load import build
from moe_dist.data.loader import build_data
from moe_dist.models import export_model, load_model
from moe_dist.train.finished import evaluate_run, export_run
from tests.models.compare import file_tensors, same_bits
from tests.run.runs import events, make_files, settings, stored, train

STEPS = 4

pytestmark = pytest.mark.timeout(1800)


def run_settings(files, family: str, precision: str, **sections) -> dict:
    return settings(
        files,
        files / f"run-{family}",
        family,
        data={"eval": {"held": {"path": str(files / "text.jsonl"), "limit": 12}}},
        train={"steps": STEPS, "precision": precision},
        **sections,
    )


def evaluate(tree: dict) -> dict:
    step, results = evaluate_run(build(tree))
    assert step == STEPS
    return results["held"]


def plain_loss(tree: dict, folder) -> float:
    """Mean loss of plain transformers over the held-out documents, each of them alone and without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = build(tree)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    total, count = 0.0, 0
    for batch in build_data(config.data, tokenizer).eval["held"].batches():
        real = batch["attention_mask"][0].bool()
        starts = (batch["position_ids"][0][real] == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], int(real.sum())], strict=True):
            ids = batch["input_ids"][:, start:stop]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].float()
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += stop - start - 1
    return total / count


def test_an_fp32_run_is_its_export(ranks, tmp_path):
    files = make_files(tmp_path, "deepseek_v3")
    tree = run_settings(
        files,
        "deepseek_v3",
        "fp32",
        parallel={"expert": 2, "zero_stage": 3},
        moe={"expert_bias_rate": 0.05, "balance_loss": "layer_global"},
    )
    assert ranks(2, train, tree, timeout=600) == [0, 0]
    run, export = files / "run-deepseek_v3", tmp_path / "export"
    assert export_run(run, export) == (export, STEPS)

    (found,) = ranks(1, evaluate, {**tree, "parallel": {}}, timeout=600)
    spread = ranks(2, evaluate, tree, timeout=600)
    assert spread[0] == spread[1]
    (in_the_run,) = [line["domains"]["held"] for line in events(run, "eval")]
    expected = plain_loss(tree, export)
    for figures in (found, spread[0], in_the_run):
        assert figures["loss"] == pytest.approx(expected, rel=1e-6)
        assert figures["tokens"] == found["tokens"] > 50

    # The bias that balances experts has moved, and is in the export.
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before, after = file_tensors(files / "deepseek_v3")[name], file_tensors(export)[name]
    assert not torch.equal(before, after)
    assert torch.equal(after, stored(run, STEPS)["buffers", name, -1])

    again = tmp_path / "again"
    export_model(load_model(export), again)
    same_bits(file_tensors(again), file_tensors(export))


@pytest.mark.parametrize(("stage", "tied"), [(1, False), (2, True)])
def test_a_bf16_export_is_the_masters_rounded_once(ranks, tmp_path, stage, tied):
    files = make_files(tmp_path, "qwen3_moe", dtype=torch.bfloat16, tie_word_embeddings=tied)
    tree = run_settings(files, "qwen3_moe", "bf16", parallel={"expert": 2, "zero_stage": stage})
    assert ranks(2, train, tree, timeout=600) == [0, 0]
    export = tmp_path / "export"
    export_run(files / "run-qwen3_moe", export)
    tensors, masters = file_tensors(export), stored(files / "run-qwen3_moe", STEPS)
    checked = 0
    for (kind, name, expert), master in masters.items():
        if kind != "weights":
            continue
        rounded = master.to(torch.bfloat16)
        if expert < 0:
            expected = {name: rounded}
        else:
            path, _, part = name.rpartition(".")
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            halves = rounded.chunk(len(names))
            expected = {f"{path}.{expert}.{n}.weight": half for n, half in zip(names, halves, strict=True)}
        for key, tensor in expected.items():
            assert tensors[key].dtype == torch.bfloat16
            assert torch.equal(tensors[key], tensor), key
            checked += 1
    assert checked == len(tensors)
    assert ("lm_head.weight" in tensors) == (not tied)
    assert any(
        not torch.equal(m, m.to(torch.bfloat16).float()) for (kind, *_), m in masters.items() if kind == "weights"
    )
