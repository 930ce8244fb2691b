"""E8: at the paper's learning rate a bf16 weight hardly ever moves; its fp32 master does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from moe_dist.data.attention import model_inputs
from moe_dist.train.engine import build_engine
from moe_dist.train.losses import label_loss_sum
from tests.methods.esft.cases import batch, built, configured
from tests.models.tiny import CONFIGS

STEPS, RATE, EXPERTS = 100, 1e-5, {"0": [0, 1, 2, 3, 4, 5, 6], "1": [2, 5]}


def initialised(path: Path) -> str:
    """A model with weights as transformers initialises them, N(0, 0.02): those of trained models look like that."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("qwen3_moe", **CONFIGS["qwen3_moe"])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return initialised(tmp_path_factory.mktemp("precision") / "model")


def masters(engine) -> dict:
    return {(f.name, f.expert, f.offset): f.tensor.detach().clone() for f in engine.fragments("weights")}


def test_masters_move_and_bf16_weights_alone_do_not(folder):
    model, grid = built(configured(folder, EXPERTS))
    engine = build_engine(
        model, grid, precision="bf16", betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0, backend="plain"
    )
    before = masters(engine)
    for step in range(STEPS):
        data = batch(step, rows=8)
        logits = engine.forward(**model_inputs(data, model.config, dtype=model.dtype)).logits
        engine.backward(label_loss_sum(logits, data["labels"]) / 184)
        engine.step(RATE)
    after = masters(engine)
    assert {expert for name, expert, _ in after if ".layers.1." in name} == {2, 5}
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    moved = sum(int((after[key] != before[key]).sum()) for key in before)
    total = sum(tensor.numel() for tensor in before.values())
    assert moved >= 0.99 * total, f"{moved / total:.4f} of the masters moved"

    # The negative control: the same steps with parameters and AdamW's state in bf16, as the published code has them.
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    stacks = [parameter for name, parameter in plain.named_parameters() if ".experts." in name]
    start = [stack.detach().clone() for stack in stacks]
    optimizer = torch.optim.AdamW(stacks, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(STEPS):
        data = batch(step, rows=8)
        logits = plain(input_ids=data["input_ids"], use_cache=False).logits
        (label_loss_sum(logits, data["labels"]) / 184).backward()
        torch.nn.utils.clip_grad_norm_(stacks, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    changed = sum(int((a != b).sum()) for a, b in zip(stacks, start, strict=True)) / sum(map(torch.numel, stacks))
    assert 0.05 < changed < 0.3, f"{changed:.4f} of the bf16 weights changed"
