"""The training loop on data that is made for the occasion: step after step, each rank gets what a script says."""

from __future__ import annotations

import math
from contextlib import ExitStack
from unittest.mock import patch

import torch

from moe_dist.config.load import build
from moe_dist.data.loader import Data
from moe_dist.data.packing import IGNORE
from moe_dist.errors import PolicyStop
from moe_dist.train import loop, passes
from tests.run.runs import LENGTH, VOCAB

# What a step may bring; the last three harm one rank alone.
FULL, RANK_PADDING, PADDING, FEW = "full", "padding on rank 0", "padding everywhere", "fewer tokens than ranks"
NAN_LOSS, NAN_GRADIENT, INF_GRADIENT = "NaN loss", "NaN gradient", "infinite gradient"
HARMED = (NAN_LOSS, NAN_GRADIENT, INF_GRADIENT)


class Script:
    """Stands where `TrainData` does."""

    def __init__(self, steps: tuple[str, ...]):
        self.steps, self.position = steps, 0

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def next_batch(self, size: int, *, rank: int, ranks: int, micro_batch: int) -> list[dict]:
        self.kind, self.last_rank, self.rank = self.steps[self.position], ranks - 1, rank
        self.position += 1
        count = size // (ranks * micro_batch)
        return [self._batch(micro_batch, seed=(self.position * 7 + rank) * 7 + number) for number in range(count)]

    def drawn(self, state: dict, size: int, *, micro_batch: int) -> list[list[tuple[str, int]]]:
        rows = [("script", state["position"] * size + number) for number in range(size)]
        return [rows[start : start + micro_batch] for start in range(0, size, micro_batch)]

    def _batch(self, rows: int, seed: int) -> dict[str, torch.Tensor]:
        real = LENGTH
        if self.kind == PADDING or (self.kind == RANK_PADDING and self.rank == 0):
            real = 0
        elif self.kind == FEW:
            real = self.last_rank if self.rank == self.last_rank else 0
        ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
        mask = (torch.arange(LENGTH) < real).long().expand(rows, -1)
        place = torch.arange(LENGTH)
        return {
            "input_ids": ids * mask,
            "labels": torch.where(mask.bool() & (place > 0), ids, IGNORE),
            "attention_mask": mask,
            "position_ids": torch.where(place < real, place, place - real).expand(rows, -1),
        }

    def harmed(self, loss_sum):
        """`loss_sum`, wrong on one rank in the steps that say so."""

        def harm(logits_BMV: torch.Tensor, targets_BM: torch.Tensor, **options) -> torch.Tensor:
            factor = math.inf if self.kind == INF_GRADIENT else math.nan
            if self.kind in (NAN_GRADIENT, INF_GRADIENT) and self.rank == 0:
                logits_BMV.register_hook(lambda gradient: gradient * factor)
            loss = loss_sum(logits_BMV, targets_BM, **options)
            return loss * math.nan if self.kind == NAN_LOSS and self.rank == self.last_rank else loss

        return harm


def train(tree: dict, steps: tuple[str, ...]) -> int | str:
    """On each rank: the exit code of a run over these steps, or the message of its PolicyStop."""
    script = Script(steps)
    with ExitStack() as patches:
        patches.enter_context(patch.object(loop, "build_data", lambda *_, **__: Data(script, {}, {"train": {}})))
        patches.enter_context(patch.object(passes, "target_loss_sum", script.harmed(passes.target_loss_sum)))
        try:
            return loop.train(build(tree))
        except PolicyStop as stop:
            return str(stop)
