"""LoRA on a real dense model: by the code that `moe-dist train` runs, and by plain PEFT with torch's AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from moe_dist.config.load import build
from moe_dist.config.schema import RunConfig
from moe_dist.parallel.grid import build_grid
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.engine import build_engine
from moe_dist.train.losses import count_labels, target_loss_sum
from moe_dist.train.rows import model_inputs, rank_rows
from tests.parity import problem
from tests.train.runner import packed

RANK, ALPHA, SEED = 4, 12, 5


@dataclass(frozen=True)
class Case:
    family: str
    world: int = 1
    stage: int = 1
    precision: str = "fp32"
    recompute: bool = False
    targets: tuple[str, ...] = ("all-linear",)
    sequence: int = 1


def config(case: Case, folder: str) -> RunConfig:
    return build(
        {
            "run": {"dir": "unused"},
            "model": {"path": folder, "attention": "eager"},
            "data": {"train": ["unused.jsonl"]},
            "parallel": {"zero_stage": case.stage, "sequence": case.sequence},
            "train": {"precision": case.precision, "recompute": case.recompute},
            "lora": {"rank": RANK, "alpha": ALPHA, "targets": list(case.targets), "seed": SEED},
        }
    )


@torch.no_grad()
def fill_b(model: nn.Module) -> None:
    """Values for every B, which starts at zero and would leave A without a gradient."""
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if ".lora_B." in name:
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def ours(case: Case, folder: str) -> dict:
    """On each rank: the gradients of the first step, the norms, and the weights after three, of what it owns."""
    settings, grid = config(case, folder), build_grid(sequence=case.sequence)
    model = build_model(settings, plan_model(settings, grid), grid)
    fill_b(model)
    engine = build_engine(
        model,
        grid,
        zero_stage=case.stage,
        precision=case.precision,
        betas=problem.BETAS,
        eps=problem.EPS,
        weight_decay=problem.DECAY,
        clip_norm=problem.CLIP,
        accumulation_steps=problem.ROWS // grid.data,
        reduce_bucket_size=300,
    )
    result: dict = {"norms": []}
    for step, rate in enumerate(problem.RATES):
        batches = [problem.padded(row) for row in problem.rows(step)]
        labels = sum(count_labels(batch["labels"]) for batch in batches)
        for batch in batches[grid.data_rank :: grid.data]:
            rows = rank_rows(batch, grid)
            logits = engine.forward(**model_inputs(rows, model.config, dtype=model.dtype)).logits
            engine.backward(target_loss_sum(logits, rows.targets_BM) / labels)
        if step == 0:
            result["gradients"] = packed(engine.gradients())
        result["norms"].append(engine.step(rate).grad_norm)
    result["weights"] = packed(engine.fragments("weights"))
    engine.close()
    return result


def plain(case: Case, folder: str) -> dict:
    """The same by PEFT's model on one process: fp32 masters beside it, row after row, nothing padded."""
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(SEED)
    targets = "all-linear" if case.targets == ("all-linear",) else list(case.targets)
    wrapped = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    model = wrapped.base_model.model
    fill_b(model)
    model.to(torch.bfloat16 if case.precision == "bf16" else torch.float32)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained)
    masters = {name: parameter.detach().float().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(masters.values(), betas=problem.BETAS, eps=problem.EPS, weight_decay=problem.DECAY)
    result: dict = {"norms": []}
    for step, rate in enumerate(problem.RATES):
        rows = problem.rows(step)
        labels = sum(int((row["labels"][1:] != problem.IGNORE).sum()) for row in rows)
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for row in rows:
            logits = model(input_ids=row["input_ids"].unsqueeze(0), use_cache=False).logits[0].float()
            loss = F.cross_entropy(logits[:-1], row["labels"][1:], ignore_index=problem.IGNORE, reduction="sum")
            (loss / labels).backward()
            for name, parameter in trained.items():
                masters[name].grad += parameter.grad
                parameter.grad = None
        if step == 0:
            result["gradients"] = {(name, -1): master.grad.flatten().clone() for name, master in masters.items()}
        result["norms"].append(torch.nn.utils.clip_grad_norm_(masters.values(), problem.CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(masters[name])
    result["weights"] = {(name, -1): master.flatten() for name, master in masters.items()}
    return result


def folder_of(case: Case, folder: Path) -> str:
    from tests.methods.nexus.tiny import dense_folder

    return str(dense_folder(case.family, folder))
