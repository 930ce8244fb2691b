"""What a layer's dispatch sends between ranks, on paper: rows and bytes of each dispatcher, inside and across nodes.

A *flow* `[P,P]` says how many rows each rank of the expert group sends to each other one on their way to the experts;
as many come back. A dispatcher has one flow a hop. `counted_flows` has them exactly, for given experts of given tokens;
`expected_flows` as expectations for one token a rank. Ranks `n·L .. n·L + L − 1` share node n.

How many rows are expected, for a token that draws K different experts (`moe.draws`):

- alltoall: one for each of them, so for each rank the sum of its experts' probabilities to be drawn.
- dedup: one for each rank that has at least one of them.
- node: one for each *node* that has at least one of them, to the rank there with the sender's local index; from there
  one for each rank of that node. The first hop is what crosses the network: a row a node, not a row a rank. The second
  has as many rows as dedup has in all, but those to the arriving rank itself, which do not travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_dist.moe.draws import MostEntropy, Uniform

COUNT_BYTES = 8  # int64
SLOT_BYTES = 4 + 4  # int32 seat, fp32 probability
SCALAR_BYTES = 4  # the gradient of a probability, fp32


@dataclass(frozen=True)
class Group:
    """An expert group on paper: the rank of each expert, the number of ranks, and how many of them share a node."""

    rank_of_expert: tuple[int, ...]
    ranks: int
    node_size: int

    def __post_init__(self):
        if self.ranks % self.node_size and self.ranks > self.node_size:
            raise ValueError(f"{self.ranks} ranks do not fill nodes of {self.node_size}")

    @staticmethod
    def even(ranks: int, *, experts: int, node_size: int) -> Group:
        """Experts in order, as many on every rank (the first ones hold one more where they do not divide)."""
        short, longer = divmod(experts, ranks)
        held = [short + (rank < longer) for rank in range(ranks)]
        return Group(tuple(rank for rank, count in enumerate(held) for _ in range(count)), ranks, node_size)

    @property
    def held_P(self) -> np.ndarray:
        return np.bincount(self.rank_of_expert, minlength=self.ranks)

    @property
    def node_P(self) -> np.ndarray:
        return np.arange(self.ranks) // self.node_size

    @property
    def local_P(self) -> np.ndarray:
        return np.arange(self.ranks) % self.node_size


@dataclass(frozen=True)
class Sent:
    """Rows or bytes that ranks send to other ranks, by where those are."""

    inside: float
    across: float

    @property
    def total(self) -> float:
        return self.inside + self.across


def expected_flows(
    dispatcher: str, group: Group, *, top_k: int, load_E: Sequence[float] | None = None
) -> list[np.ndarray]:
    """Expected rows `[P,P]` of each hop (sender, receiver) where every rank has one token with `top_k` experts.

    load_E: tokens of each expert, or any measure in proportion; None: all are equally likely. Raises ValueError where
    no choice of `top_k` different experts has such loads.
    """
    draw = Uniform(len(group.rank_of_expert), top_k) if load_E is None else MostEntropy(load_E, top_k)
    on_rank_PE = np.arange(group.ranks)[:, None] == np.asarray(group.rank_of_expert)
    if dispatcher == "alltoall":
        rows_P = on_rank_PE @ draw.inclusion_E
        return [np.tile(rows_P, (group.ranks, 1))]
    hit_P = draw.hit(on_rank_PE)
    if not _two_hops(dispatcher, group):
        return [np.tile(hit_P, (group.ranks, 1))]
    nodes = group.node_P[-1] + 1
    node_NE = np.add.reduceat(on_rank_PE, np.arange(0, group.ranks, group.node_size), axis=0)
    hit_node_P = draw.hit(node_NE > 0)[group.node_P]
    # The token of each rank with this local index, one a node, arrives at the sender of the second hop.
    return [_same_local(group) * hit_node_P, _same_node(group) * (nodes * hit_P)]


def counted_flows(dispatcher: str, group: Group, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rows `[P,P]` (int64) of each hop for the experts `ids[s]` `[T,K]` of rank s's tokens; negative ids: dropped."""
    flow_PP = np.zeros((group.ranks, group.ranks), dtype=np.int64)
    across_PP, inside_PP = flow_PP.copy(), flow_PP.copy()
    rank_E = np.asarray(group.rank_of_expert)
    for source, ids_TK in enumerate(ids):
        slots_TP = np.zeros((len(ids_TK), group.ranks), dtype=np.int64)
        token_N, slot_N = np.nonzero(ids_TK >= 0)
        np.add.at(slots_TP, (token_N, rank_E[ids_TK[token_N, slot_N]]), 1)
        if dispatcher == "alltoall":
            flow_PP[source] = slots_TP.sum(0)
            continue
        hit_TP = slots_TP > 0
        flow_PP[source] = hit_TP.sum(0)
        arriving_P = group.node_P * group.node_size + source % group.node_size
        at_node_TN = np.logical_or.reduceat(hit_TP, np.arange(0, group.ranks, group.node_size), axis=1)
        across_PP[source] = (_same_local(group)[source] * at_node_TN.sum(0)[group.node_P]).astype(np.int64)
        np.add.at(inside_PP, (arriving_P, np.arange(group.ranks)), flow_PP[source])
    return [across_PP, inside_PP] if _two_hops(dispatcher, group) else [flow_PP]


def rows_sent(flows: Sequence[np.ndarray], group: Group) -> Sent:
    """Rows that leave their rank on the way to the experts, over all hops and ranks. As many come back."""
    return _split(sum(flows), group)


def step_bytes(
    dispatcher: str,
    flows: Sequence[np.ndarray],
    group: Group,
    *,
    hidden: int,
    top_k: int,
    row_bytes: int = 2,
    back_bytes: int = 2,
    chunks: int = 1,
) -> Sent:
    """Bytes that all ranks send in a layer's forward and backward.

    row_bytes: of an element on its way to the experts (tokens, and gradients of the output in the backward).
    back_bytes: of one on its way home (outputs, gradients of the tokens); inside the node of a second hop it has at
    least the four of fp32. With each row travel the seats and the
    probabilities of its slots, and in the backward the gradients of those come home. Before anything else, in each of
    the `chunks`, every rank tells every other one of the hop how many rows it gets and, at the last hop, how many of
    them for each of its experts.
    """
    columns = 1 if dispatcher == "alltoall" else top_k
    total_PP = np.zeros((group.ranks, group.ranks))
    for hop, flow_PP in enumerate(flows):
        last = hop == len(flows) - 1
        there = 2 * hidden * row_bytes + SLOT_BYTES * columns
        element = max(back_bytes, 4) if len(flows) > 1 and last else back_bytes
        back = 2 * hidden * element + SCALAR_BYTES * columns
        counts_P = COUNT_BYTES * chunks * (1 + group.held_P * last)
        partners_PP = 1 if len(flows) == 1 else (_same_node(group) if last else _same_local(group))
        total_PP += flow_PP * there + flow_PP.T * back + counts_P * partners_PP
    return _split(total_PP, group)


def _two_hops(dispatcher: str, group: Group) -> bool:
    """Nodes of one rank, or a single one, leave nothing to the second hop: the node form is then the same as dedup."""
    assert dispatcher in ("alltoall", "dedup", "node"), dispatcher
    return dispatcher == "node" and 1 < group.node_size < group.ranks


def _split(sent_PP: np.ndarray, group: Group) -> Sent:
    same_PP = _same_node(group)
    inside = (sent_PP * same_PP).sum() - np.trace(sent_PP)
    return Sent(float(inside), float((sent_PP * ~same_PP).sum()))


def _same_node(group: Group) -> np.ndarray:
    return group.node_P[:, None] == group.node_P


def _same_local(group: Group) -> np.ndarray:
    return group.local_P[:, None] == group.local_P
