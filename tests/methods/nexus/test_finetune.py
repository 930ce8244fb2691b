"""ESFT of a Nexus model: scores of top-1 routing, selected experts trained over ranks, adapter, merge, export."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import yaml

from moe_dist.cli.main import main
from moe_dist.config.expert_files import read_expert_config
from moe_dist.methods import esft
from moe_dist.models import load_model
from tests.methods.nexus.text import TOKENS, tokenizer, write_text
from tests.methods.nexus.tiny import nexus_folder
from tests.models.compare import distance, file_tensors, same_bits
from tests.run.runs import settings, train

EXPERTS = 5  # divides by no number of ranks
CASES = {
    # router: family, ranks, training and layout
    "prototype": (
        "llama",
        4,
        {"pipeline": 2, "sequence": 2, "expert": 2, "zero_stage": 2, "placement": "balanced", "spare_experts": 1},
        "fp32",
    ),
    "paper": ("qwen3", 2, {"expert": 1, "zero_stage": 3}, "bf16"),
    "linear": ("mistral", 2, {"tensor": 2, "expert": 2, "zero_stage": 1}, "fp32"),
}


def _batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, TOKENS, (2, 14), generator=generator) for _ in range(3)]
    mask = torch.ones(2, 14, dtype=torch.int64)
    mask[1, 9:] = 0
    return [{"input_ids": ids_BL, "attention_mask": mask, "labels": ids_BL} for ids_BL in ids]


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**_batches()[0]).logits


def _expert_of(key: str) -> tuple[str, int] | None:
    """(layer index, expert) of a routed expert's tensor."""
    before, routed, rest = key.partition(".mlp.experts.")
    return (before.rpartition(".")[2], int(rest.partition(".")[0])) if routed else None


def _changed(found: dict, base: dict) -> set[tuple[str, int]]:
    """The routed experts with another bit than in `base`; any other tensor has to be the same to the bit."""
    differing = {key for key in base if not torch.equal(found[key], base[key])}
    assert found.keys() == base.keys()
    assert all(_expert_of(key) is not None for key in differing), sorted(differing)
    return {_expert_of(key) for key in differing}


@pytest.mark.parametrize("router", CASES)
def test_the_experts_that_a_task_uses_and_nothing_else(ranks, tmp_path, capsys, router):
    family, world, layout, precision = CASES[router]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    files, base = write_text(tmp_path), tmp_path / "model"
    nexus_folder(family, base, router=router, num_experts=EXPERTS, vocab_size=TOKENS, dtype=dtype)
    tokenizer().save_pretrained(base)
    tree = settings(
        tmp_path,
        tmp_path / "run",
        "model",
        data={"train": files["code"]},
        parallel=layout,
        train={"steps": 4, "precision": precision},
        moe={"balance_loss": "layer_global", "balance_coef": 0.05},
    )
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**tree, "parallel": {}}))

    summary, chosen = tmp_path / "summary.json", tmp_path / "experts.json"
    assert main(["esft", "score", str(tmp_path / "task.yaml"), "--out", str(summary)]) == 0
    for kind, mode in (("gate", "fraction_of_mass"), ("token", "absolute")):
        words = ["--scores", str(summary), "--kind", kind, "--p", "0.5", "--p-mode", mode, "--out", str(chosen)]
        assert main(["esft", "select", *words]) == 0
        selected = read_expert_config(chosen).experts
        assert set(selected) == {"0", "1"}
        assert all(0 < len(ids) < EXPERTS for ids in selected.values())

    tree["trainable"] = {"experts_file": str(chosen)}
    assert ranks(world, train, tree, timeout=120) == [0] * world
    assert main(["esft", "adapter", str(tmp_path / "run"), str(tmp_path / "adapter")]) == 0
    assert main(["esft", "merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", str(base)]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0

    expected = {(layer, expert) for layer, ids in selected.items() for expert in ids}
    adapter = file_tensors(tmp_path / "adapter")
    assert {_expert_of(key) for key in adapter} == expected
    merged, before = file_tensors(tmp_path / "merged"), file_tensors(base)
    assert _changed(merged, before) == expected  # router, its statistics and the shared experts among the others
    same_bits(file_tensors(tmp_path / "exported"), merged)
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()

    model = load_model(base)
    untouched = _logits(model)
    esft.load_adapter(model, tmp_path / "adapter")
    trained = load_model(tmp_path / "merged")
    assert torch.equal(_logits(model), _logits(trained))
    assert not torch.equal(_logits(trained), untouched)
    esft.unload_adapter(model, tmp_path / "adapter")
    assert torch.equal(_logits(model), untouched)

    capsys.readouterr()
    stock = family != "qwen3"
    assert main(["nexus", "export", str(tmp_path / "merged"), str(tmp_path / "served")]) == 0
    assert ("export as qwen2_moe" in capsys.readouterr().out) == stock
    if stock:
        served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "served")
        assert served.config.model_type == "qwen2_moe"
        assert distance(_logits(served), _logits(trained)) < 1e-6


@pytest.mark.parametrize("router", CASES)
def test_scores_of_one_raw_probability_a_token(tmp_path, router):
    """A token has one expert: its token score is how often it came first, its gate score by what probability."""
    folder = nexus_folder("llama", tmp_path / "model", router=router, num_experts=EXPERTS, vocab_size=TOKENS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    counts, gates, tokens = (torch.zeros(2, EXPERTS, dtype=torch.float64) for _ in range(3))
    for batch in _batches():
        seen = []
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
            for layer in model.model.layers
        ]
        _ = _logits_of(model, batch)
        for hook in hooks:
            hook.remove()
        for layer, (logits_TE, _, _) in enumerate(seen):
            probs_TE = logits_TE[batch["attention_mask"].flatten().bool()].double().softmax(1)
            best_T = probs_TE.argmax(1)
            counts[layer] += torch.bincount(best_T, minlength=EXPERTS)
            gates[layer].index_add_(0, best_T, probs_TE.max(1).values)
            tokens[layer] += len(probs_TE)
    for scored in (model, load_model(folder)):
        summary = esft.score_experts(scored, _batches())
        for layer in range(2):
            token, gate = (summary.scores[kind][str(layer)] for kind in ("token", "gate"))
            assert token == pytest.approx((counts / tokens)[layer].tolist(), abs=1e-6)
            assert gate == pytest.approx((gates / tokens)[layer].tolist(), abs=1e-6)
            assert sum(token) == pytest.approx(1.0)
            assert 1 / EXPERTS < sum(gate) < 1
            assert summary.extra["gate_mass"][str(layer)] == pytest.approx(sum(gate))


def _logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("router", CASES)
def test_in_somebody_else_s_loop(tmp_path, router):
    """The two calls of the library on a Nexus model of plain transformers: only the selected experts move."""
    folder = nexus_folder("qwen2", tmp_path / "model", router=router, num_experts=EXPERTS, vocab_size=TOKENS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    esft.apply_selection(model, {0: [4, 1], 1: [2]})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in _batches():
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".experts.trainable." in name}
    assert len(moved) == 4
    model.save_pretrained(tmp_path / "adapter")
    assert main(["esft", "merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", str(folder)]) == 0
    assert _changed(file_tensors(tmp_path / "merged"), file_tensors(folder)) == {("0", 4), ("0", 1), ("1", 2)}
    assert distance(_logits(load_model(tmp_path / "merged")), _logits(model)) < 2e-6
    assert json.loads((tmp_path / "adapter" / "expert_cfg.json").read_text())["shared_experts"] is False
