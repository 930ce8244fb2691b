"""A tiny model with a selection of its experts, in one process or on the ranks of a pool."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from moe_dist.config.load import build
from moe_dist.config.schema import RunConfig
from moe_dist.parallel.grid import build_grid
from moe_dist.train.build import build_model, plan_model
from tests.models.tiny import VOCAB


def configured(folder: str | Path, experts: dict[str, list[int]], **sections) -> RunConfig:
    """Only these experts train: no shared ones, no router, nothing else."""
    return build(
        {
            "run": {"dir": "unused"},
            "model": {"path": str(folder), "attention": "eager"},
            "data": {"train": ["unused.jsonl"]},
            "trainable": {"experts": experts, "shared_experts": False, "non_expert_modules": False},
            **sections,
        }
    )


def built(config: RunConfig) -> tuple[nn.Module, object]:
    """The model of a configuration with this rank's experts, and the grid. Collective."""
    grid = build_grid(expert=config.parallel.expert)
    return build_model(config, plan_model(config, grid), grid), grid


def batch(step: int = 0, rows: int = 2, length: int = 24) -> dict[str, torch.Tensor]:
    """A full batch `[rows, length]` of random tokens, as the data module makes them."""
    ids_BL = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(100 + step))
    return {
        "input_ids": ids_BL,
        "labels": ids_BL.clone(),
        "attention_mask": torch.ones_like(ids_BL),
        "position_ids": torch.arange(length).expand(rows, length),
    }
