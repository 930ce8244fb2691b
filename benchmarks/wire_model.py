"""Rows and bytes of each dispatcher for 8 to 1,024 GPUs on paper, and the same model against counted exchanges.

    python -m benchmarks.wire_model [--json FILE] [--full]

On paper: 8 ranks a node, 4,096 tokens a rank, top 8 of 64, 128 or 256 experts chosen uniformly, hidden 7,168 in bf16.
An expert group has as many ranks as there are GPUs, at most one an expert: with more GPUs there are several groups, and
a token's rows stay as they are. `ours` is the node-aware form, in one node the deduplicated one.

Counted: the workloads W0 to W7 and the real routing on 2 and 4 gloo ranks in two simulated nodes, every dispatcher,
bf16 and fp32 sums, one and two parts: the bytes that leave the ranks, inside nodes and across, forward and backward,
counts and probabilities included. They must be those of the model to the byte, or the exit status is 1. `expected` is
the model that knows the experts' loads only, against what the real routing sends.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from benchmarks._harness import Missed, row, run
from benchmarks._ranks import on_ranks
from benchmarks._wire_runs import EXPERTS, HIDDEN, Way, bytes_sent, layer_on, layout, real_ids, step
from benchmarks._workloads import WORKLOADS, workload
from moe_dist.moe.traffic_model import Group, Sent, counted_flows, expected_flows, rows_sent, step_bytes
from moe_dist.ops import native
from moe_dist.parallel.grid import build_grid

NODE, TOP_K, MODEL_HIDDEN, TOKENS = 8, 8, 7168, 4096  # tokens a rank
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
EXPERT_COUNTS = (64, 128, 256)
WAYS = [Way("alltoall"), Way("dedup"), Way("node"), Way("dedup", wide_sums=True), Way("node", chunks=2),
        Way("node", wide_sums=True, chunks=2)]  # fmt: skip
REAL_TOP_K, REAL_LAYERS = 6, range(0, 26, 5)


def main() -> None:
    run("wire_model", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict | str]:
    yield from on_paper()
    for ranks in (2, 4):
        yield from on_ranks(ranks, counted, range(26) if full else REAL_LAYERS)


def on_paper() -> Iterator[dict]:
    for experts in EXPERT_COUNTS:
        for gpus in GPUS:
            if gpus > experts and experts != max(EXPERT_COUNTS):
                continue  # as with as many GPUs as experts
            group = Group.even(min(gpus, experts), experts=experts, node_size=NODE)
            plain, shared, nodes = (cost(dispatcher, group) for dispatcher in ("alltoall", "dedup", "node"))
            case = f"{gpus} GPUs, E{experts} K{TOP_K}"
            if gpus == NODE:
                yield row(f"{case}, rows a token", shared[0].inside, plain[0].inside, "alltoall", "rows")
                yield row(f"{case}, MB a token and step", shared[1].total, plain[1].total, "alltoall", "MB")
                continue
            for name, (rows, size) in (("alltoall", plain), ("dedup", shared)):
                yield row(f"{case}, rows a token across nodes", nodes[0].across, rows.across, name, "rows")
                yield row(f"{case}, MB a token and step, inside nodes too", nodes[1].total, size.total, name, "MB")


def cost(dispatcher: str, group: Group) -> tuple[Sent, Sent]:
    """(rows to other ranks each way, MB in forward and backward), of a token."""
    tokens = group.ranks * TOKENS
    flows = [TOKENS * flow for flow in expected_flows(dispatcher, group, top_k=TOP_K)]
    rows = rows_sent(flows, group)
    size = step_bytes(dispatcher, flows, group, hidden=MODEL_HIDDEN, top_k=TOP_K)
    return (
        Sent(rows.inside / tokens, rows.across / tokens),
        Sent(size.inside / tokens / 1e6, size.across / tokens / 1e6),
    )


def counted(real_layers: range) -> Iterator[dict | str]:
    ranks = dist.get_world_size()
    grid = build_grid(expert=ranks, node_size=ranks // 2)
    group = Group.even(ranks, experts=EXPERTS, node_size=ranks // 2)
    layer = layer_on(grid, torch.bfloat16)
    routings = {name: workload(name, layout(ranks), step=1) for name in WORKLOADS}
    if (real := real_ids(ranks)) is not None:
        routings |= {f"real routing, layer {number + 1}": real[number] for number in real_layers}
    else:
        yield "The real routing is not in ../shared/data/esft beside the checkout: no rows for it."
    for way in WAYS:
        sums = {"made": np.zeros((2, 2)), "real": np.zeros((2, 2))}  # counted and modelled, inside and across
        for name, ids in routings.items():
            numbers = [ids_TK.numpy() for ids_TK in ids]
            model = predicted(way, counted_flows(way.dispatcher, group, numbers), group)
            found = bytes_sent(step(layer, way, ids[grid.expert_rank]), grid)
            if (found != model).any():
                where = f"{way} on {ranks} ranks, {name}"
                raise Missed(f"{where}: {found.tolist()} bytes inside and across nodes, {model.tolist()} by the model")
            if name in WORKLOADS:
                sums["made"] += [found, model]
                continue
            load_E = np.bincount(np.concatenate(numbers).ravel(), minlength=EXPERTS)
            tokens = sum(map(len, numbers)) / ranks
            flows = [tokens * flow for flow in expected_flows(way.dispatcher, group, top_k=REAL_TOP_K, load_E=load_E)]
            sums["real"] += [found, predicted(way, flows, group)]
        case = f"{ranks} ranks in 2 nodes, {way}"
        for kind, peer in (("made", "the model, exact"), ("real", "expected from the experts' loads")):
            for where, ours, theirs in zip(("inside", "across"), *sums[kind] / 1e6, strict=True):
                if ours:
                    name = "W0 to W7" if kind == "made" else "real routing"
                    yield row(f"{case}, {name}, {where}", ours, theirs, peer, "MB")


def predicted(way: Way, flows: list[np.ndarray], group: Group) -> np.ndarray:
    """Bytes `[2]` inside and across."""
    back_bytes = 4 if way.wide_sums else 2
    sent = step_bytes(
        way.dispatcher, flows, group, hidden=HIDDEN, top_k=REAL_TOP_K, back_bytes=back_bytes, chunks=way.chunks
    )
    return np.array([sent.inside, sent.across])


if __name__ == "__main__":
    print(native.status())
    main()
