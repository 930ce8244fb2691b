"""Rows on the wire of a real routing, counted in real exchanges: no more than there are (token, other rank) pairs.

    python -m benchmarks.wire [--json FILE] [--full]

Every layer of the routing (DeepSeek-V2-Lite on the intent task of ESFT: 26 layers, 8,222 tokens, top 6 of 64) goes
forward and backward through our layer at EP 2, 4 and 8, on as many gloo ranks, with narrow tokens. Each rank's rows to
each other rank are compared with what the routing demands, one by one, there and back, in both directions:

  dedup      the distinct (token, other rank) pairs
  alltoall   the (token, slot) pairs whose expert is on another rank
  node       with two simulated nodes: the distinct (token, other node) pairs across

A single row more or less ends the benchmark with exit status 1, and so do other means than those known of this routing:
4.56 ranks a token at EP=8 and 1.98 at EP=2, the own one included.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from benchmarks._harness import Missed, row, run
from benchmarks._ranks import on_ranks
from benchmarks._wire_runs import EXPERTS, HIDDEN, Call, Way, layer_on, real_ids, step
from moe_dist.ops import native
from moe_dist.parallel.grid import Grid, build_grid

SIZES = (2, 4, 8)
TOP_K = 6
KNOWN = {2: 1.98, 8: 4.56}  # ranks a token, its own included, to two digits


def main() -> None:
    run("wire", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict | str]:
    if real_ids(1) is None:
        yield "No rows: the routing of the intent task is not in ../shared/data/esft beside the checkout."
        return
    for size in SIZES:
        yield from on_ranks(size, count_routing)


def count_routing() -> Iterator[dict | str]:
    size = dist.get_world_size()
    grid = build_grid(expert=size, node_size=size // 2)
    layer = layer_on(grid, torch.bfloat16)
    layers = real_ids(size)
    tokens = sum(map(len, layers[0])) * len(layers)
    sums = dict.fromkeys(("alltoall", "dedup", "own rank included", "node", "dedup across"), 0)
    node_P = np.arange(size) // grid.node_size
    elsewhere_P = node_P != node_P[grid.expert_rank]
    for number, ids in enumerate(layers):
        mine = ids[grid.expert_rank]
        slots, hits, nodes = demanded(ids, grid)
        calls = {dispatcher: step(layer, Way(dispatcher), mine) for dispatcher in ("alltoall", "dedup", "node")}
        check("alltoall", number, calls["alltoall"], slots, grid)
        check("dedup", number, calls["dedup"], hits, grid)
        check_across(number, calls["node"], nodes, elsewhere_P, grid)
        for dispatcher in ("alltoall", "dedup"):
            (there, *_) = rows_of(calls[dispatcher])
            sums[dispatcher] += there.sum() - there[grid.expert_rank]
        sums["own rank included"] += rows_of(calls["dedup"])[0].sum()
        sums["dedup across"] += rows_of(calls["dedup"])[0][elsewhere_P].sum()
        sums["node"] += rows_of(calls["node"])[0][elsewhere_P].sum()
    total = torch.tensor(list(sums.values()))
    dist.all_reduce(total)
    mean = {what: count / tokens for what, count in zip(sums, total.tolist(), strict=True)}
    case, unit = f"EP={size}, rows a token", "rows"
    yield row(f"{case} to other ranks, each way", mean["dedup"], mean["alltoall"], "a row for each expert", unit)
    yield row(f"{case}, own rank included", mean["own rank included"], TOP_K, "a row for each expert", unit)
    yield row(f"{case} to the other of 2 nodes", mean["node"], mean["dedup across"], "a row for each rank", unit)
    if size in KNOWN and round(mean["own rank included"], 2) != KNOWN[size]:
        raise Missed(f"{mean['own rank included']:.4f} ranks a token at EP={size}, not {KNOWN[size]}")


def demanded(ids: list[torch.Tensor], grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From the routing alone: slots `[P,P]` and distinct pairs `[P,P]` from rank to rank; distinct (token, other node)
    pairs of each rank `[P]`."""
    held = EXPERTS // grid.expert
    slots, hits = np.zeros((2, grid.expert, grid.expert), dtype=np.int64)
    nodes = np.zeros(grid.expert, dtype=np.int64)
    for source, ids_TK in enumerate(ids):
        rank_TK = ids_TK.numpy() // held
        slots[source] = np.bincount(rank_TK.ravel(), minlength=grid.expert)
        for ranks_K in rank_TK.tolist():
            there = sorted(set(ranks_K))
            hits[source, there] += 1
            nodes[source] += len({rank // grid.node_size for rank in there} - {source // grid.node_size})
    return slots, hits, nodes


def rows_of(calls: list[Call]) -> list[np.ndarray]:
    """Rows of tokens to each rank, an exchange each."""
    return [call.rows_P for call in calls if call.width == HIDDEN]


def check(dispatcher: str, number: int, calls: list[Call], rows_PP: np.ndarray, grid: Grid) -> None:
    """Forward there and back, backward there and back: the four exchanges of rows, to each rank. Collective."""
    me, found = grid.expert_rank, rows_of(calls)
    wanted = [rows_PP[me], rows_PP[:, me]] * 2
    wrong = len(found) != 4 or any((a != b).any() for a, b in zip(found, wanted, strict=True))
    agree(wrong, f"{dispatcher}, layer {number}: a rank sent other rows than the routing demands")


def check_across(number: int, calls: list[Call], nodes_P: np.ndarray, elsewhere_P: np.ndarray, grid: Grid) -> None:
    """The rows that leave this rank's node in forward and backward, and as many that come back. Collective."""
    crossing = [int(rows_P[elsewhere_P].sum()) for rows_P in rows_of(calls)]
    half = len(crossing) // 2  # forward, then backward; in each the first and the last are those across
    ends = [crossing[i] for i in (0, half - 1, half, -1)]
    total = torch.tensor(ends)
    dist.all_reduce(total)
    mine = nodes_P[grid.expert_rank]
    wrong = ends[0] != mine or ends[2] != mine or sum(ends) != sum(crossing) or (total != int(nodes_P.sum())).any()
    agree(wrong, f"node, layer {number}: other rows than the routing demands crossed")


def agree(wrong: bool, message: str) -> None:
    """Raises `Missed` on all ranks where it is wrong on any."""
    flag = torch.tensor(int(wrong))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if flag:
        raise Missed(message)


if __name__ == "__main__":
    print(native.status())
    main()
