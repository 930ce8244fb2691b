"""Listening to the first step: the logits of every row, and the experts that each token chose."""

from __future__ import annotations

from functools import partial

import torch
from safetensors import safe_open
from torch import nn

from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.prove import plain
from moe_dist.prove.certificate import Check
from moe_dist.prove.compare import BITS, OUTPUTS
from moe_dist.prove.errors import Tallies, everyone
from moe_dist.prove.problem import Problem


class Outputs:
    """A context of the passes of step 0. `compare` afterwards is collective."""

    def __init__(self, model: nn.Module, problem: Problem, grid: Grid):
        self.model, self.problem, self.grid = model, problem, grid
        self.logits: list[torch.Tensor] = []
        self.reached: dict[str, bool] = {}
        self.ids: dict[str, list[torch.Tensor]] = {name: [] for name, _ in moe_layers(model)}

    def __enter__(self) -> Outputs:
        def keep(_, __, output) -> None:
            if self.grid.is_last_stage:
                self.logits.append(output.logits.detach().float().cpu())

        self._hooks = [self.model.register_forward_hook(keep)]
        for name, layer in moe_layers(self.model):
            hear = partial(self._hear, name)
            self._hooks.append(layer.register_forward_hook(hear))
            layer.recorders.append(lambda ids_TK, _, kept=self.ids[name]: kept.append(ids_TK.detach().cpu()))
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()
        for _, layer in moe_layers(self.model):
            layer.recorders.pop()

    def _hear(self, name: str, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.reached[name] = output.requires_grad

    def compare(self, reached: dict[str, bool]) -> list[Check]:
        """Checks of the logits of each row, of the experts that tokens chose in each layer, and of how far down the
        backward goes. reached: of each layer of experts, whether the plain process' backward comes to it. Collective.
        """
        _, numbers = self.problem.batches(0, self.grid)
        tallies, seen = Tallies(), {}
        with safe_open(self.problem.work / plain.ROWS, framework="pt") as reference:
            for batch, rows in enumerate(numbers):
                for place, row in enumerate(rows):
                    whole_LV = reference.get_tensor(f"logits.{row}")
                    if self.grid.is_last_stage:
                        self._add_logits(tallies, row, self.logits[batch][place], whole_LV)
                    for name, kept in self.ids.items():
                        found = self._compare_ids(kept[batch], place, reference.get_tensor(f"ids.{row}.{name}"))
                        seen[row, name] = found
            merged = tallies.over_ranks(self.grid)
            tokens = [sum(len(ids) for ids, _ in documents) for documents in self.problem.documents(0)]
            missing = [
                f"row {row}: the logits of all tokens do not come once"
                for row, count in enumerate(tokens)
                if row not in merged or merged[row].count != count * self.problem.vocabulary
            ]
        logits = Check.of(
            "logits", {f"row {row}": tally.error for row, tally in merged.items()}, OUTPUTS, tuple(missing)
        )
        # What a later stage is given always gets a gradient back: there may be something that trains below.
        mine = self.reached if self.grid.is_first_stage else {}
        backward = {
            self.problem.original(name): float(found != reached[name])
            for own in everyone(mine, self.grid)
            for name, found in own.items()
        }
        return [logits, self._chosen(seen, tokens), Check.of("backward", backward, BITS)]

    def _add_logits(self, tallies: Tallies, row: int, found_MV: torch.Tensor, whole_LV: torch.Tensor) -> None:
        """This rank's part of a row: the tokens of its block, the vocabulary of its tensor rank."""
        grid, (length, width) = self.grid, found_MV.shape
        start, column = grid.sequence_rank * length, 0
        if width < whole_LV.shape[1]:
            column = grid.tensor_rank * width
        elif grid.tensor_rank:
            return  # the same logits as those of the first tensor rank
        expected = whole_LV[start : start + length, column : column + width]
        tallies.add(row, found_MV[: len(expected), : expected.shape[1]], expected)

    def _compare_ids(self, ids_TK: torch.Tensor, place: int, whole_LK: torch.Tensor) -> tuple[int, int]:
        """(tokens of this rank's slice of a row, how many of them chose other experts)."""
        size, grid = self.problem.length // self.grid.slices, self.grid
        found_SK = ids_TK.view(-1, size, ids_TK.shape[1])[place]
        expected_SK = whole_LK[grid.slice_rank * size : (grid.slice_rank + 1) * size]
        same_S = found_SK[: len(expected_SK)].sort().values == expected_SK.sort().values
        return len(expected_SK), int((~same_S.all(1)).sum())

    def _chosen(self, seen: dict[tuple[int, str], tuple[int, int]], tokens: list[int]) -> Check:
        counts: dict[tuple[int, str], tuple[int, int]] = {}
        for own in everyone(seen, self.grid):
            for key, (count, other) in own.items():
                before = counts.get(key, (0, 0))
                counts[key] = before[0] + count, before[1] + other
        errors = {
            f"{self.problem.original(name)}, row {row}": other / tokens[row] if count == tokens[row] else float("inf")
            for (row, name), (count, other) in counts.items()
        }
        return Check.of("chosen experts", errors, BITS)
