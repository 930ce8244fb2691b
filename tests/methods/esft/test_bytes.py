"""E5: optimizer and gradient bytes are those of the selected experts, and how experts are stored changes no loss."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from moe_dist.data.attention import model_inputs
from moe_dist.models.surgery import moe_layers
from moe_dist.train.engine import build_engine
from moe_dist.train.losses import count_labels, label_loss_sum
from tests.methods.esft.cases import batch, built, configured
from tests.models.tiny import make_folder

EXPERTS = {"0": [0, 2], "1": [1, 3, 5, 6]}
# ZeRO 1 and 2 fill the flat tensor of a group up to a multiple of twice the ranks that share it, 3 each parameter to a
# multiple of them: fewer elements than this, in all.
ALIGNMENT = 16
OF_AN_EXPERT = 3 * 32 * 24
SELECTED = sum(map(len, EXPERTS.values())) * OF_AN_EXPERT


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_folder("qwen3_moe", tmp_path_factory.mktemp("bytes")))


def measure(folder: str, ep: int, stage: int, precision: str, placement: str = "balanced") -> dict:
    """On each rank, after one step: bytes of moments, masters and gradients, elements of seats without an expert."""
    parallel = {"expert": ep, "zero_stage": stage, "placement": placement}
    model, grid = built(configured(folder, EXPERTS, parallel=parallel))
    engine = build_engine(model, grid, zero_stage=stage, precision=precision, clip_norm=1.0, reduce_bucket_size=5000)
    data = batch(grid.rank)
    logits = engine.forward(**model_inputs(data, model.config, dtype=model.dtype)).logits
    engine.backward(label_loss_sum(logits, data["labels"]) / count_labels(data["labels"]) / grid.world)
    gradients = sum(g.tensor.numel() * g.tensor.element_size() for g in engine.gradients())
    held = sum(piece.gradient().numel() for piece in engine._backend.held)
    frozen_without = all(p.grad is None for p in model.parameters() if not p.requires_grad)
    engine.step(1e-3)
    states = engine._backend.optimizer.state
    masters = {id(piece.flat): piece.flat for piece in engine._backend.held}.values()
    empty = sum(layer.trainable.seat_ids.count(None) for _, layer in moe_layers(model) if layer.trainable is not None)
    result = {
        "moments": sum(s[kind].numel() * 4 for s in states.values() for kind in ("exp_avg", "exp_avg_sq")),
        "others": sum(
            t.numel() for s in states.values() for k, t in s.items() if k not in ("exp_avg", "exp_avg_sq", "step")
        ),
        "masters": sum(flat.numel() * 4 for flat in masters),
        "dtypes": {str(flat.dtype) for flat in masters}
        | {str(s[kind].dtype) for s in states.values() for kind in ("exp_avg", "exp_avg_sq")},
        "gradients": gradients,
        "held": held,
        "frozen_without": frozen_without,
        "empty": empty * OF_AN_EXPERT,
        "replicas": grid.expert_data,
    }
    engine.close()
    return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("ep", [1, 2])
def test_bytes_of_optimizer_and_gradients(ranks, folder, ep, stage, precision):
    results = ranks(2, measure, folder, ep, stage, precision, timeout=60)
    copies = results[0]["replicas"] if stage == 0 else 1
    for kind, each in (("moments", 8), ("masters", 4)):
        total = sum(result[kind] for result in results)
        wanted = each * copies * SELECTED
        assert wanted <= total <= wanted + each * ALIGNMENT, (kind, total, wanted)
    assert all(result["dtypes"] == {"torch.float32"} for result in results)
    assert all(result["others"] == 0 for result in results)
    # Owned once over all ranks, in fp32; what ranks hold of it are copies at stage 0 alone.
    assert sum(result["gradients"] for result in results) == 4 * SELECTED
    assert sum(result["held"] for result in results) <= copies * SELECTED + ALIGNMENT
    assert all(result["frozen_without"] and result["empty"] == 0 for result in results)


def test_a_seat_without_an_expert_costs_as_much(ranks, folder):
    """In the order of ids both experts of the first layer are the first rank's; the second has two seats for none."""
    results = ranks(2, measure, folder, 2, 2, "bf16", "contiguous", timeout=60)
    assert [result["empty"] for result in results] == [0, 2 * OF_AN_EXPERT]
    total = sum(result["moments"] for result in results)
    wanted = 8 * (SELECTED + 2 * OF_AN_EXPERT)
    assert wanted <= total <= wanted + 8 * ALIGNMENT
    assert sum(result["gradients"] for result in results) == 4 * SELECTED


class ListedExperts(nn.Module):
    """Experts as a list of modules, each with matrices of its own, as older checkpoints and the published code have."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        pairs = zip(stock.gate_up_proj.detach(), stock.down_proj.detach(), strict=True)
        self.experts = nn.ModuleList(
            nn.ParameterDict({"w_in": w_in.clone(), "w_out": w_out.clone()}) for w_in, w_out in pairs
        )

    def forward(self, hidden_TH, ids_TK, weights_TK):
        out_TH = torch.zeros_like(hidden_TH)
        for index, expert in enumerate(self.experts):
            token, slot = (ids_TK == index).nonzero(as_tuple=True)
            gate, up = F.linear(hidden_TH[token], expert["w_in"]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, expert["w_out"])
            out_TH = out_TH.index_add(0, token, rows * weights_TK[token, slot, None])
        return out_TH


def test_stacked_and_listed_experts_have_the_same_losses(folder):
    rate, steps, hyper = 3e-3, 8, {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    model, grid = built(configured(folder, EXPERTS))
    engine = build_engine(model, grid, clip_norm=1.0, backend="plain", **hyper)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    plain.requires_grad_(False)
    trained = []
    for layer, ids in EXPERTS.items():
        mlp = plain.model.layers[int(layer)].mlp
        mlp.experts = ListedExperts(mlp.experts).requires_grad_(False)
        for expert in ids:
            trained += mlp.experts.experts[expert].requires_grad_(True).parameters()
    optimizer = torch.optim.AdamW(trained, lr=rate, **hyper)
    losses = []
    for step in range(steps):
        data = batch(step)
        labels = count_labels(data["labels"])
        ours = label_loss_sum(engine.forward(**model_inputs(data, model.config)).logits, data["labels"]) / labels
        engine.backward(ours)
        engine.step(rate)
        theirs = label_loss_sum(plain(input_ids=data["input_ids"], use_cache=False).logits, data["labels"]) / labels
        optimizer.zero_grad()
        theirs.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append((ours.item(), theirs.item()))
    assert losses[0][0] > losses[-1][0] or len({round(a, 6) for a, _ in losses}) == steps
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-6)
