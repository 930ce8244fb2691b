"""Routings to measure and to test with: eight made ones, W0 to W7, and a real one.

Each made one isolates a cause of imbalance; it follows from its name, the layout and the step alone, and every token
has `top_k` distinct experts. Experts lie on ranks as `moe.placement.contiguous` puts them.

  W0 balanced   every expert has as many tokens as any other
  W1 hot expert one expert in every token, the others balanced
  W2 hot rank   as many as can be of a token's experts on rank 0
  W3 spread     a token's experts on as many ranks as can be
  W4 ragged     ranks with very different numbers of tokens, the last one with none
  W5 idle rank  nothing for the experts of the last rank
  W6 rotating   W1, the hot expert another one in every step
  W7 burst      balanced, but for step 1: all tokens have the same experts (with top_k 1: a single one)

The real routing is that of DeepSeek-V2-Lite on the intent task of ESFT, where its file is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_dist.moe.placement import contiguous

DATA = Path(__file__).parents[2] / "shared" / "data" / "esft"
REAL_EXPERTS = 64


@dataclass(frozen=True)
class Layout:
    """Ranks of the expert group, experts, experts a token, and tokens a rank (on average, where they are ragged)."""

    ranks: int
    experts: int
    top_k: int
    tokens: int

    def held(self) -> list[list[int]]:
        """The experts of each rank."""
        return [list(ids) for ids in contiguous(self.experts, ranks=self.ranks).ranks]


def workload(name: str, layout: Layout, *, step: int = 0) -> list[torch.Tensor]:
    """The experts `ids_TK` (int64, global ids) of each rank's tokens in this step."""
    generator = torch.Generator().manual_seed(1000 * list(WORKLOADS).index(name) + step)
    tokens = _ragged(layout) if name == "W4 ragged" else [layout.tokens] * layout.ranks
    return list(WORKLOADS[name](layout, step, sum(tokens), generator).split(tokens))


def logits(ids_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """fp32 `[T,E]` of which the K largest of a token are its ids, in their order.

    Distinct multiples of 1/8, so that the choice is the same in every dtype (bf16 has them exactly for E <= 256).
    """
    rising_K = experts - torch.arange(ids_TK.shape[1])
    order_TE = (-torch.arange(experts)).repeat(len(ids_TK), 1).scatter(1, ids_TK, rising_K.expand_as(ids_TK))
    place_TE = order_TE.argsort(dim=1).argsort(dim=1)
    return (place_TE - experts // 2) / 8


def real_routing(folder: Path = DATA) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Experts `ids_LTK` int64 and gates fp32 `[26, 8222, 6]` of the real routing; None where the file is not there."""
    path = folder / "intent_routing.npz"
    if not path.is_file():
        return None
    with np.load(path) as file:
        ids, gates = file["expert_ids"], file["gate_1e4"]
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(gates.astype(np.float32) / 1e4)


def _balanced(layout: Layout, step: int, tokens: int, generator: torch.Generator, among: list[int] | None = None):
    """Blocks of as many tokens as there are experts, each expert K times in a block: rows of a Latin square."""
    among_E = torch.tensor(among if among is not None else range(layout.experts))
    rows = []
    for start in range(0, tokens, len(among_E)):
        first_T = torch.randperm(len(among_E), generator=generator)[: tokens - start]
        offset_K = torch.randperm(len(among_E), generator=generator)[: layout.top_k]
        named_E = among_E[torch.randperm(len(among_E), generator=generator)]
        rows.append(named_E[(first_T[:, None] + offset_K) % len(among_E)])
    return torch.cat(rows) if rows else torch.empty(0, layout.top_k, dtype=torch.int64)


def _hot_expert(layout: Layout, step: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return _with_hot(layout, layout.experts // 3, tokens, generator)


def _rotating(layout: Layout, step: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    # By a rank's experts and one more: the next hot expert is on the next rank and has another place there.
    return _with_hot(layout, step * (layout.experts // layout.ranks + 1) % layout.experts, tokens, generator)


def _with_hot(layout: Layout, hot: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    others = [expert for expert in range(layout.experts) if expert != hot]
    ids_TK = _balanced(layout, 0, tokens, generator, among=others)
    slot_T1 = torch.randint(layout.top_k, (tokens, 1), generator=generator)
    return ids_TK.scatter(1, slot_T1, hot)


def _hot_rank(layout: Layout, step: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    first = layout.held()[0]
    rest = [expert for expert in range(layout.experts) if expert not in first]
    there = torch.tensor(first)[_shuffled(tokens, len(first), generator)]
    elsewhere = torch.tensor(rest, dtype=torch.int64)[_shuffled(tokens, len(rest), generator)]
    return torch.cat([there, elsewhere], dim=1)[:, : layout.top_k]


def _spread(layout: Layout, step: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Of each rank an expert before any has two: ranks in random order, experts of a rank in random order."""
    held = layout.held()
    columns = []
    for turn in range(max(map(len, held))):
        # -1 where a rank has no further expert, moved behind the others below
        column = torch.full((tokens, layout.ranks), -1)
        for rank, ids in enumerate(held):
            if turn < len(ids):
                column[:, rank] = torch.tensor(ids)[(torch.arange(tokens) // layout.ranks + turn) % len(ids)]
        column = column.gather(1, _shuffled(tokens, layout.ranks, generator))
        columns.append(column.gather(1, (column < 0).int().argsort(dim=1, stable=True)))
    ids = torch.cat(columns, dim=1)
    return ids.gather(1, (ids < 0).int().argsort(dim=1, stable=True))[:, : layout.top_k]


def _ragged_ids(layout: Layout, step: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return _shuffled(tokens, layout.experts, generator)[:, : layout.top_k]


def _ragged(layout: Layout) -> list[int]:
    """Tokens of each rank: each as many as twice the next one, none on the last, as many in all as elsewhere."""
    total = layout.ranks * layout.tokens
    if layout.ranks == 1:
        return [total]
    shares = [2 ** (layout.ranks - 2 - rank) for rank in range(layout.ranks - 1)]
    counts = [total * share // sum(shares) for share in shares]
    return [counts[0] + total - sum(counts), *counts[1:], 0]


def _idle_rank(layout: Layout, step: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    idle = set(layout.held()[-1]) if layout.ranks > 1 else set()
    busy = [expert for expert in range(layout.experts) if expert not in idle]
    return _balanced(layout, step, tokens, generator, among=busy)


def _burst(layout: Layout, step: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    if step != 1:
        return _balanced(layout, step, tokens, generator)
    return torch.arange(layout.top_k).repeat(tokens, 1)


def _shuffled(tokens: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`[T, count]`, a random order of range(count) in each row."""
    return torch.rand(tokens, count, generator=generator).argsort(dim=1)


WORKLOADS: dict[str, Callable[[Layout, int, int, torch.Generator], torch.Tensor]] = {
    "W0 balanced": _balanced,
    "W1 hot expert": _hot_expert,
    "W2 hot rank": _hot_rank,
    "W3 spread": _spread,
    "W4 ragged": _ragged_ids,
    "W5 idle rank": _idle_rank,
    "W6 rotating": _rotating,
    "W7 burst": _burst,
}
