"""The training problem of all cells: rows of unequal length with unequal numbers of labels, three AdamW steps."""

from __future__ import annotations

import torch

from moe_dist.config.load import build
from moe_dist.config.schema import RunConfig
from tests.parity.cells import Cell

ROWS, LENGTH, VOCAB = 8, 12, 96
RATES = (1e-3, 2e-3, 5e-4)
CLIP, DECAY, EPS, BETAS, COEF = 0.5, 0.1, 1e-6, (0.9, 0.95), 0.02
IGNORE = -100
MIXSE = {"router": ["mixse_router.*"], "joint": ["mixse_router.*", "*.experts_*"]}  # patterns of what trains


def rows(step: int) -> list[dict[str, torch.Tensor]]:
    """The rows of one optimizer step: input_ids, labels `[length]` without padding. One row has a single label."""
    generator = torch.Generator().manual_seed(1000 + step)
    made = []
    for row in range(ROWS):
        length = LENGTH - (row * 5) % 7
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: (row * 3) % (length - 1)] = IGNORE
        if row == 3:
            labels[: length - 1] = IGNORE
        made.append({"input_ids": ids, "labels": labels})
    return made


def padded(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The row as a batch `[1, LENGTH]` as the data module makes them; padding is a document of its own."""
    length = len(row["input_ids"])
    rest = LENGTH - length

    def fill(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_full((rest,), value)]).unsqueeze(0)

    return {
        "input_ids": fill(row["input_ids"], 0),
        "labels": fill(row["labels"], IGNORE),
        "attention_mask": fill(torch.ones(length, dtype=torch.long), 0),
        "position_ids": torch.cat([torch.arange(length), torch.arange(rest)]).unsqueeze(0),
    }


def config(cell: Cell, folder: str) -> RunConfig:
    """The run configuration of a cell, as a user would write it."""
    trainable: dict = {"include": ["*"]}
    moe_layers = ("1",) if cell.family.startswith("deepseek") else ("0", "1")
    if cell.trainable == "some":
        trainable["experts"] = {layer: [1, 3] for layer in moe_layers}
    elif cell.trainable == "one rank":  # contiguous placement: expert 0 lives on the first rank of a group
        trainable = {"include": ["*.experts.*"], "experts": {layer: [0] for layer in moe_layers}}
    elif cell.trainable == "one layer":
        trainable = {"include": ["*.experts.*"], "experts": {moe_layers[0]: [0, 2, 3]}}
    elif cell.trainable in MIXSE:
        trainable = {"include": MIXSE[cell.trainable]}
    return build(
        {
            "run": {"dir": "unused"},
            "model": {"path": folder, "dtype": "float32", "attention": "eager"},
            "data": {"train": ["unused.jsonl"], "seq_len": LENGTH},
            "parallel": {
                **cell.sizes,
                "node_size": cell.node_size,
                "zero_stage": cell.stage,
                "reduce_bucket_size": cell.bucket,
                "placement": "balanced" if cell.trainable == "some" else "contiguous",
            },
            "moe": {"balance_loss": cell.balance, "balance_coef": COEF, **cell.moe},
            "train": {
                "steps": len(RATES),
                "precision": "fp32",
                "clip_norm": CLIP,
                "weight_decay": DECAY,
                "eps": EPS,
                "betas": list(BETAS),
                "recompute": cell.recompute,
            },
            "trainable": trainable,
        }
    )
