"""`import moe_dist.hf`: our experts as an implementation of transformers' experts interface, against its eager one."""

from __future__ import annotations

from copy import deepcopy

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import moe_dist.hf
from moe_dist.models.families import FAMILIES, find_experts, stock_names_of
from moe_dist.models.nexus.configuration_nexus import MODEL_TYPES as NEXUS_TYPES
from tests.families.tiny import VOCAB, experts_classes, tiny_model
from tests.models.compare import distance

TOLERANCE = 2e-6
NAMED = sorted(set(FAMILIES) - set(NEXUS_TYPES))
# Transposed; a norm behind every expert; no gate. In float64: the attention around the experts of muse_spark loses
# more in float32 than the tolerance. Some norms and routers compute in float32 whatever the model's dtype.
ODD = ["aria", "muse_spark", "nemotron_h"]
CASES = [(family, torch.float32, TOLERANCE) for family in NAMED] + [(family, torch.float64, 5e-7) for family in ODD]


def build(family: str) -> torch.nn.Module:
    return tiny_model(family, dict(experts_classes())[family])


def with_ours(model: torch.nn.Module) -> torch.nn.Module:
    ours = deepcopy(model)
    ours.set_experts_implementation("moe_dist")
    return ours


def tokens(rows: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    out = model(input_ids=ids, use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize(("family", "dtype", "tolerance"), CASES)
def test_outputs_and_every_gradient_equal_eager(family, dtype, tolerance):
    stock = build(family).to(dtype)
    stock.set_experts_implementation("eager")
    ours = with_ours(stock)
    expected, got = logits(stock, tokens()), logits(ours, tokens())
    assert distance(got.detach(), expected.detach()) <= tolerance
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    for out in (expected, got):
        (out * weight).sum().backward()
    theirs = dict(stock.named_parameters())
    stacked = {f"{path}.{name}" for path, module in find_experts(stock) for name in stock_names_of(module).values()}
    whole = torch.stack([parameter.grad.norm() for parameter in theirs.values() if parameter.grad is not None]).norm()
    compared = 0
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        pair = (parameter.grad, theirs[name].grad)
        for mine, other in zip(*pair, strict=True) if name in stacked else [pair]:
            # Below a 1e-5th of the whole gradient a tensor holds rounding.
            assert (mine - other).norm() <= tolerance * max(other.norm(), 1e-5 * whole), name
            compared += 1
    assert compared > 10


def test_it_is_our_kernels_that_run(monkeypatch):
    ours = with_ours(build("olmoe"))
    calls = []
    forward = moe_dist.hf.mixture
    monkeypatch.setattr(moe_dist.hf, "mixture", lambda *a, **k: calls.append(1) or forward(*a, **k))
    logits(ours, tokens())
    assert len(calls) == ours.config.num_hidden_layers


def test_by_name_in_from_pretrained(tmp_path):
    stock = build("mixtral")
    stock.save_pretrained(tmp_path)
    ours = type(stock).from_pretrained(tmp_path, experts_implementation="moe_dist")
    assert distance(logits(ours, tokens()).detach(), logits(stock, tokens()).detach()) <= TOLERANCE
    assert torch.equal(
        ours.generate(tokens(2, 5), max_new_tokens=6, do_sample=False),
        stock.generate(tokens(2, 5), max_new_tokens=6, do_sample=False),
    )


def test_slots_of_other_ranks_add_nothing():
    """transformers' expert parallelism marks them by the id num_experts; their weight must get no gradient either."""
    _, experts = next(find_experts(with_ours(build("mixtral"))))
    hidden_TH = torch.randn(6, experts.down_proj.shape[1])
    ids_TK = torch.tensor([[0, experts.num_experts]] * 6)
    weights_TK = torch.rand(6, 2, requires_grad=True)
    both = moe_dist.hf.experts_forward(experts, hidden_TH, ids_TK, weights_TK)
    alone = moe_dist.hf.experts_forward(experts, hidden_TH, ids_TK[:, :1], weights_TK[:, :1])
    assert torch.equal(both, alone)
    both.sum().backward()
    assert weights_TK.grad[:, 0].all()
    assert not weights_TK.grad[:, 1].any()


def test_autocast_computes_in_its_dtype():
    stock = build("qwen3_moe")
    stock.set_experts_implementation("eager")
    ours = with_ours(stock)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = logits(ours, tokens()), logits(stock, tokens())
    exact = logits(stock, tokens())
    assert distance(got, exact) <= 1.2 * distance(expected, exact)
    assert distance(got, exact) > 1e-4, "autocast changed nothing"


def test_under_trainer_with_lora_and_checkpointing(tmp_path):
    """A Trainer run of a PEFT model goes the same way as with eager experts."""
    rows = [{"input_ids": row, "labels": row.clone()} for row in tokens(8, 10)]
    losses = {}
    for name in ("eager", "moe_dist"):
        model = build("qwen3_moe")
        model.set_experts_implementation(name)
        torch.manual_seed(0)
        target = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.down_proj"]}
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, **target))
        arguments = TrainingArguments(
            tmp_path / name,
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            activation_checkpointing=True,
            save_strategy="no",
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses[name] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses["eager"]) == 3
    assert losses["moe_dist"] == pytest.approx(losses["eager"], rel=1e-5)


def test_an_activation_with_parameters_is_refused(monkeypatch):
    ours = with_ours(build("mixtral"))
    for _, experts in find_experts(ours):
        experts.act_fn = torch.nn.PReLU()
    with pytest.raises(moe_dist.errors.UserError, match="learnt activations"):
        logits(ours, tokens())
