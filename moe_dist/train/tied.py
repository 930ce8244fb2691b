"""A tensor that two pipeline stages hold: an embedding that is the last stage's head, too.

Both copies have to stay one tensor. Each stage reduces its own copy's gradient over its ranks, as it does all others;
after that the two gradients are added up on both sides, so that both optimizers take the same step from the same
state. The sum has two terms, and a + b is b + a to the bit. In norms and checkpoints the first stage's copy counts.

The two stages' optimizers cut the tensor in different ways. So each rank tells once what it holds, and from then on
sends every element to those ranks of the other stage that hold it, and no further.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.parallel.collectives import exchange
from moe_dist.parallel.grid import Grid
from moe_dist.parallel.shard import shard_of
from moe_dist.train.pieces import Piece

Span = tuple[int, int]  # first element of a flattened local tensor, and one past the last


@dataclass(frozen=True)
class _Part:
    """Elements of a piece, from `start` on, that also a rank of the other stage holds."""

    piece: Piece
    start: int
    length: int

    def gradient(self) -> torch.Tensor:
        whole = self.piece.gradient()
        assert whole is not None, "a tied tensor without gradient"
        return whole[self.start : self.start + self.length]


def tied_copies(model: nn.Module, grid: Grid) -> dict[str, str]:
    """What the last stage holds copies of, as its model's `tied_copies` says: name there -> name on the first stage.
    The same on all ranks of both stages; empty on others. Collective over both."""
    if grid.embedding_group is None:
        return {}
    told: list[dict[str, str]] = [{}] * (2 * grid.stage_size)
    dist.all_gather_object(told, dict(getattr(model, "tied_copies", {})), group=grid.embedding_group)
    return told[-1]  # the group's members are the ranks of the first stage, then those of the last


class TiedCopies:
    """The tensors that the first and the last stage hold both, on a rank of one of them. Collective over these ranks.

    copies: of `tied_copies`.
    """

    def __init__(self, model: nn.Module, grid: Grid, copies: dict[str, str]):
        self._group, self._size, self._first = grid.embedding_group, grid.stage_size, grid.is_first_stage
        self._place = grid.stage_rank + (0 if self._first else self._size)
        local = dict(model.named_parameters())
        here = [local[origin if self._first else copy] for copy, origin in sorted(copies.items())]
        self._tensors = [parameter for parameter in here if parameter.requires_grad]
        self._tensor_parallel = grid.tensor
        self._sends: list[list[_Part]] = []
        self._receives: list[list[_Part]] = []

    def __bool__(self) -> bool:
        """Whether any of them trains."""
        return bool(self._tensors)

    def is_copy(self, parameter: nn.Parameter) -> bool:
        """Whether the first stage answers for this parameter."""
        return not self._first and any(parameter is tensor for tensor in self._tensors)

    def connect(self, held: Iterable[Piece]) -> None:
        """Find out who needs what from whom. Collective. held: the pieces that this rank's optimizer steps."""
        held = list(held)
        pieces = [[piece for piece in held if piece.parameter is tensor] for tensor in self._tensors]
        mine = [[(piece.offset, piece.offset + piece.length) for piece in found] for found in pieces]
        spans: list[list[list[Span]]] = [[]] * (2 * self._size)
        dist.all_gather_object(spans, mine, group=self._group)
        self._sends, self._receives = ([[] for _ in spans] for _ in range(2))
        for number, (tensor, found) in enumerate(zip(self._tensors, pieces, strict=True)):
            parts = 1 if shard_of(tensor) is None else self._tensor_parallel
            for source, target, start, stop in _transfers([each[number] for each in spans], parts):
                for place, lists, peer in ((source, self._sends, target), (target, self._receives, source)):
                    if place == self._place:
                        piece = next(p for p in found if p.offset <= start and stop <= p.offset + p.length)
                        lists[peer].append(_Part(piece, start - piece.offset, stop - start))

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add the other stage's gradients to this one's. Collective; after the last backward of a step."""
        outgoing = [part.gradient() for parts in self._sends for part in parts]
        # A rank may hold no element of any, and still takes part.
        sent = torch.cat(outgoing) if outgoing else torch.empty(0, device=self._tensors[0].device)
        send, receive = (
            [sum(part.length for part in parts) for parts in lists] for lists in (self._sends, self._receives)
        )
        incoming = exchange(sent, send, receive, self._group, what="tied gradients")
        for part in (part for parts in self._receives for part in parts):
            mine, incoming = incoming[: part.length], incoming[part.length :]
            part.gradient().add_(mine)


def _transfers(spans: list[list[Span]], parts: int) -> Iterator[tuple[int, int, int, int]]:
    """(sender, receiver, first element, one past the last), such that every span gets all its elements once.

    spans: by place, what each rank of the one stage holds and then of the other. parts: only every `parts`-th rank of
    a stage holds the same part of the tensor. Of ranks that hold the same, as all do at ZeRO 0, the one at the same
    place of its stage sends.
    """
    size = len(spans) // 2
    for target, wanted in enumerate(spans):
        partner, other = (target + size) % (2 * size), 0 if target >= size else size
        for start, stop in wanted:
            if any(low <= start and stop <= high for low, high in spans[partner]):
                sources = [partner]
            else:
                sources = [source for source in range(other, other + size) if (source - partner) % parts == 0]
            for source in sources:
                for low, high in spans[source]:
                    if max(low, start) < min(high, stop):
                        yield source, target, max(low, start), min(high, stop)
