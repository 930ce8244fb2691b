"""Layer steps on real ranks of which everything that they exchange is counted, where torch.distributed takes it.

The counting does not rest on the package's own counters or plans: every `all_to_all_single` is seen with its group, the
rows to each rank and the bytes of a row. So that rows of tokens are known among them, HIDDEN is a width that nothing
else has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from benchmarks._workloads import Layout, real_routing
from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import contiguous
from moe_dist.parallel.grid import Grid

HIDDEN, WIDTH = 48, 16
EXPERTS = 64


@dataclass(frozen=True)
class Call:
    """One exchange of this rank: rows to each rank of the expert group (itself included), bytes and width of a row."""

    rows_P: np.ndarray
    row_bytes: int
    width: int


@dataclass(frozen=True)
class Way:
    """What a layer is told about its exchanges."""

    dispatcher: str
    wide_sums: bool = False
    chunks: int = 1

    def __str__(self) -> str:
        return self.dispatcher + ", sums in fp32" * self.wide_sums + f", {self.chunks} parts" * (self.chunks > 1)


@contextlib.contextmanager
def watched(ranks: int) -> Iterator[list[Call]]:
    """The exchanges of this rank inside the `with`, in order."""
    calls: list[Call] = []
    exchange = dist.all_to_all_single

    def seen(received, sent, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        rows_P = np.zeros(ranks, dtype=np.int64)
        rows_P[dist.get_process_group_ranks(group)] = input_split_sizes
        of_a_row = sent.shape[1:].numel()
        calls.append(Call(rows_P, of_a_row * sent.element_size(), of_a_row))
        return exchange(received, sent, output_split_sizes, input_split_sizes, group=group, async_op=async_op)

    with mock.patch.object(dist, "all_to_all_single", seen):
        yield calls


def layer_on(grid: Grid, dtype: torch.dtype) -> MoEExperts:
    """A small layer; its weights are of no account here."""
    experts = MoEExperts(ExpertSpec(EXPERTS, HIDDEN, WIDTH), contiguous(EXPERTS, ranks=grid.expert), grid, dtype=dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return experts


def step(layer: MoEExperts, way: Way, ids_TK: torch.Tensor) -> list[Call]:
    """Forward and backward of this rank's tokens -> what this rank sent."""
    layer.dispatcher, layer.wide_sums, layer.chunks = way.dispatcher, way.wide_sums, way.chunks
    dtype = next(layer.parameters()).dtype
    x_TH = torch.ones(len(ids_TK), HIDDEN, dtype=dtype, requires_grad=True)
    probs_TK = torch.full(ids_TK.shape, 0.5, requires_grad=True)
    with watched(layer.grid.expert) as calls:
        layer(x_TH, ids_TK, probs_TK).backward(torch.ones_like(x_TH))
    layer.zero_grad(set_to_none=True)
    return calls


def bytes_sent(calls: Sequence[Call], grid: Grid) -> np.ndarray:
    """int64 `[2]`: bytes of all ranks to other ranks inside their nodes, and across. Collective."""
    node_P = np.arange(grid.expert) // grid.node_size
    sent_P = sum(call.rows_P * call.row_bytes for call in calls)
    sent_P[grid.expert_rank] = 0
    inside_P = node_P == node_P[grid.expert_rank]
    total = torch.tensor([sent_P[inside_P].sum(), sent_P[~inside_P].sum()])
    dist.all_reduce(total)
    return total.numpy()


def dealt(ids_LTK: torch.Tensor, ranks: int) -> list[list[torch.Tensor]]:
    """A layer's tokens, cut into as many parts as there are ranks: `[layer][rank]`."""
    return [list(ids_TK.tensor_split(ranks)) for ids_TK in ids_LTK]


def real_ids(ranks: int) -> list[list[torch.Tensor]] | None:
    """The real routing, dealt; None where it is not at hand."""
    found = real_routing()
    return None if found is None else dealt(found[0], ranks)


def layout(ranks: int, *, tokens: int = 256, top_k: int = 6) -> Layout:
    return Layout(ranks, EXPERTS, top_k, tokens)
