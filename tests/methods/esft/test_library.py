"""The library form in the real Trainer on one device: losses, what changes, what is saved, resuming."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from moe_dist.config.expert_files import ExpertConfig, read_expert_config, write_expert_config
from moe_dist.errors import UserError
from moe_dist.methods import esft
from moe_dist.methods.esft import adapter_save
from moe_dist.methods.esft.adapter_folder import MANIFEST
from moe_dist.methods.esft.score import RoutingScores
from moe_dist.models import load_model
from moe_dist.models.families import find_experts
from moe_dist.train.trainable import layer_index
from tests.methods.esft.adapters import logits, snapshot
from tests.models.compare import distance, file_tensors, same_bits
from tests.models.tiny import CONFIGS, batch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STEPS = 4


def plain(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    """With unequal numbers of labels."""
    made = []
    for number, row in enumerate(batch(rows=count, length=12, seed=7)):
        labels = row.clone()
        labels[: number % 5] = -100
        made.append({"input_ids": row, "labels": labels, "attention_mask": torch.ones_like(row)})
    return made


def arguments(folder, **changes) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": 2e-3,  # as in tests/parity: AdamW turns the rounding of a gradient near zero into steps
            "lr_scheduler_type": "constant",
            "adam_epsilon": 1e-6,
            "max_grad_norm": 0.5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **changes,
        },
    )


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def choice(model) -> ExpertConfig:
    """In the last layer with experts its first and its last one, in an earlier one a single one."""
    counts = {str(layer_index(name)): module.num_experts for name, module in find_experts(model)}
    last = list(counts)[-1]
    return ExpertConfig({index: [n - 1, 0] if index == last else [1] for index, n in counts.items()})


def masked(model, config: ExpertConfig) -> None:
    """The plain reference: whole stacks are parameters, and gradients outside the selection are zero."""
    model.requires_grad_(False)
    for name, module in find_experts(model):
        ids = config.experts[str(layer_index(name))]
        for parameter in module.parameters():
            mask = torch.zeros(len(parameter))
            mask[ids] = 1
            mask = mask.view(-1, *[1] * (parameter.dim() - 1))
            parameter.requires_grad_(True).register_hook(lambda grad, mask=mask: grad * mask.to(grad))


def weights_on_disk(model, folder) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return file_tensors(folder)


@pytest.mark.parametrize("family", CONFIGS)
def test_trains_as_the_masked_plain_model_does(tiny, tmp_path, family):
    folder = tiny(family)
    reference, model = plain(folder), plain(folder)
    config = choice(model)
    masked(reference, config)
    want = Trainer(reference, arguments(tmp_path / "a", weight_decay=0.0), train_dataset=rows())
    want.train()

    before = logits(model)
    assert esft.apply_selection(model, config) is model
    assert distance(logits(model), before) < 1e-6
    frozen = {name: tensor for name, tensor in snapshot(model).items() if ".trainable." not in name}
    trainer = Trainer(model, arguments(tmp_path / "b", weight_decay=0.3), train_dataset=rows())
    # With decay on, what is frozen must not decay; the reference cannot say that, so its losses come without.
    trainer.train()
    same_bits({name: tensor for name, tensor in snapshot(model).items() if name in frozen}, frozen)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if ".experts.trainable." in name}

    again = plain(folder)
    esft.apply_selection(again, config)
    got = Trainer(again, arguments(tmp_path / "c", weight_decay=0.0), train_dataset=rows())
    got.train()
    assert losses(want)[0] != losses(want)[-1]
    assert losses(got) == pytest.approx(losses(want), rel=2e-6)
    got.save_model(str(tmp_path / "adapter"))
    esft.merge_adapters([tmp_path / "adapter"], tmp_path / "merged", base=folder)
    theirs = weights_on_disk(reference, tmp_path / "reference")
    for name, tensor in file_tensors(tmp_path / "merged").items():
        assert distance(tensor, theirs[name]) < 1e-5, name
    assert read_expert_config(tmp_path / "adapter" / "expert_cfg.json") == config


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_of_a_plain_model(tiny, family):
    folder = tiny(family)
    batches = [{"input_ids": batch(seed=seed), "attention_mask": torch.ones(2, 12)} for seed in (1, 2)]
    batches[1]["attention_mask"][0, :5] = 0
    model = plain(folder).train()
    summary = esft.score_experts(model, batches)
    assert model.training
    ours = load_model(folder)
    with torch.no_grad(), RoutingScores(ours) as listener:
        for given in batches:
            listener.see(given)
            ours(**given)
    want = listener.summary()
    assert summary.extra["token_counts"] == want.extra["token_counts"]
    assert summary.extra["tokens"] == 43
    for kind in ("token", "gate"):
        for layer, scores in want.of_kind(kind).items():
            assert summary.of_kind(kind)[layer] == pytest.approx(scores, abs=1e-6)
    assert summary.extra["model"]["fingerprint"].startswith("sampled:")
    assert esft.score_experts(model, batches, tokens=1).extra["tokens"] == 24
    for module in model.modules():
        assert not module._forward_pre_hooks


def test_masters_in_fp32_over_a_bf16_model(tiny, tmp_path):
    """Acceptance check E8, with its control; and bf16 that autocast makes does the same to a model in float32."""
    folder = tiny("qwen3_moe", dtype=torch.bfloat16)
    model, control = plain(folder), plain(folder)
    config = choice(model)
    esft.apply_selection(model, config)
    assert torch.equal(logits(model), logits(load_model(folder)))
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trains.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    start = {name: p.detach().clone() for name, p in trains.items()}
    options = {"learning_rate": 1e-5, "max_steps": 100, "logging_steps": 50, "adam_epsilon": 1e-12}
    trainer = Trainer(model, arguments(tmp_path / "a", **options), train_dataset=rows(32))
    trainer.train()
    moved = sum(int((p != start[name]).sum()) for name, p in trains.items())
    assert moved >= 0.99 * sum(p.numel() for p in trains.values())

    masked(control, config)
    start = {name: p.detach().clone() for name, p in control.named_parameters() if p.requires_grad}
    Trainer(control, arguments(tmp_path / "b", weight_decay=0.0, **options), train_dataset=rows(32)).train()
    ids = [
        (f"{n}.{p}", config.experts[str(layer_index(n))])
        for n, m in find_experts(control)
        for p, _ in m.named_parameters()
    ]
    moved = sum(int((control.get_parameter(name)[e] != start[name][e]).sum()) for name, experts in ids for e in experts)
    assert moved < 0.5 * sum(start[name][e].numel() for name, experts in ids for e in experts)

    # The adapter has the masters; loaded or merged they are rounded once, to what was trained.
    trainer.save_model(str(tmp_path / "adapter"))
    assert {t.dtype for t in file_tensors(tmp_path / "adapter").values()} == {torch.float32}
    fresh = load_model(folder)
    esft.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))

    wide = plain(tiny("qwen3_moe"))
    esft.apply_selection(wide, config)
    trainer = Trainer(wide, arguments(tmp_path / "c", bf16=True), train_dataset=rows())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_resuming_is_as_if_nothing_had_happened(tiny, tmp_path, monkeypatch, family):
    folder = tiny(family, dtype=torch.bfloat16)
    options = {"save_strategy": "steps", "save_steps": 2}
    config = choice(plain(folder))

    def run(out, resume=None, **more):
        model = plain(folder)
        esft.apply_selection(model, config)
        trainer = Trainer(model, arguments(out, **options, **more), train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        return trainer, model

    whole, model = run(tmp_path / "whole")
    resumed, again = run(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    same_bits(snapshot(again), snapshot(model))
    saved = tmp_path / "whole" / "checkpoint-4"
    fresh = plain(folder)
    esft.load_adapter(fresh, saved)
    assert json.loads((saved / MANIFEST).read_text())["base"]["model"] == str(folder)
    assert (saved / "trainer_state.json").exists()

    # In several files, which a Trainer reads one by one.
    monkeypatch.setattr(adapter_save, "SHARD_BYTES", 9_000)
    run(tmp_path / "shards", max_steps=2)
    assert len(list((tmp_path / "shards" / "checkpoint-2").glob("model-*.safetensors"))) > 2
    resumed, again = run(tmp_path / "shards", resume=str(tmp_path / "shards" / "checkpoint-2"))
    same_bits(snapshot(again), snapshot(model))

    other = plain(folder)
    esft.apply_selection(other, {1: [1]})
    with pytest.raises(UserError, match="saved with another selection"):
        Trainer(other, arguments(tmp_path / "other"), train_dataset=rows()).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )


def test_the_best_model_is_loaded_at_the_end(tiny, tmp_path, caplog):
    folder = tiny("deepseek_v2")
    model = plain(folder)
    esft.apply_selection(model, ExpertConfig(choice(model).experts, shared_experts=True))
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = Trainer(
        model,
        # The worst one counts as the best here, so that it is not the last.
        arguments(tmp_path / "run", load_best_model_at_end=True, greater_is_better=True, **options),
        train_dataset=rows(),
        eval_dataset=rows(4),
    )
    trainer.train()
    assert "missing keys" not in caplog.text
    best = trainer.state.best_model_checkpoint
    assert not best.endswith(f"checkpoint-{STEPS}")
    for step in range(1, STEPS + 1):
        fresh, saved = load_model(folder), tmp_path / "run" / f"checkpoint-{step}"
        esft.load_adapter(fresh, saved)
        apart = distance(logits(fresh), logits(model))
        assert apart < 1e-6 if str(saved) == best else apart > 1e-3


def test_save_pretrained_replaces_an_adapter(tiny, tmp_path):
    model = plain(tiny("qwen3_moe"))
    summary = esft.score_experts(model, rows_as_batches())
    chosen = esft.choose(summary.of_kind("token"), p=0.3)
    esft.apply_selection(model, chosen)
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"left by an older one")
    for _ in range(2):
        model.save_pretrained(out)
        esft.load_adapter(plain(tiny("qwen3_moe")), out)
    assert (out / "notes.txt").exists()
    assert json.loads((out / MANIFEST).read_text())["selection"] == chosen.record
    assert not list(out.glob(".*"))
    model.save_pretrained(tmp_path / "never", is_main_process=False)
    with pytest.raises(UserError, match="does not push"):
        model.save_pretrained(tmp_path / "never", push_to_hub=True)
    assert not (tmp_path / "never").exists()


def rows_as_batches():
    return [{name: tensor[None] for name, tensor in row.items()} for row in rows(4)]


def test_accelerate_on_one_device(tiny, tmp_path):
    from accelerate import Accelerator

    model = plain(tiny("olmoe"))
    esft.apply_selection(model, choice(model))
    frozen = {name: tensor for name, tensor in snapshot(model).items() if ".trainable." not in name}
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    seen = []
    for _ in range(3):
        loss = wrapped(**rows_as_batches()[0]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < seen[0]
    same_bits({name: tensor for name, tensor in snapshot(model).items() if name in frozen}, frozen)
    accelerator.unwrap_model(wrapped).save_pretrained(tmp_path / "adapter", save_function=accelerator.save)
    fresh = plain(tiny("olmoe"))
    esft.load_adapter(fresh, tmp_path / "adapter")
    assert distance(logits(fresh), logits(model)) < 1e-6


def test_gradient_checkpointing_changes_nothing(tiny, tmp_path):
    results = []
    for checkpointing in (False, True):
        model = plain(tiny("qwen3_moe"))
        esft.apply_selection(model, choice(model))
        options = arguments(tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        trainer = Trainer(model, options, train_dataset=rows())
        trainer.train()
        results.append(losses(trainer))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_mistakes_leave_the_model_alone(tiny, tmp_path):
    folder = tiny("qwen2_moe", dtype=torch.bfloat16)
    model = plain(folder)
    weights = snapshot(model)
    write_expert_config(tmp_path / "none.json", ExpertConfig({"0": []}))
    wrong = {
        r"no experts \[6\]": {0: [6]},
        "layer 7 has no experts": {7: [0]},
        "no experts": {0: [-1]},
        "selection is empty": tmp_path / "none.json",
        "no such file": tmp_path / "absent.json",
        "without a float32 master": ExpertConfig({"0": [1]}, shared_experts=True),
        "list is none": [1, 2],
    }
    for message, selection in wrong.items():
        with pytest.raises(UserError, match=message):
            esft.apply_selection(model, selection)
    same_bits(snapshot(model), weights)
    assert all(p.requires_grad for p in model.parameters())
    esft.apply_selection(model, {0: [1]})
    with pytest.raises(UserError, match="ours already"):
        esft.apply_selection(model, {0: [1]})
    dense = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            "llama", hidden_size=32, num_hidden_layers=1, intermediate_size=16, vocab_size=9
        )
    )
    for call in (lambda: esft.apply_selection(dense, {0: [1]}), lambda: esft.score_experts(dense, [])):
        with pytest.raises(UserError, match="not a known MoE family"):
            call()
    shutil.rmtree(tmp_path)
