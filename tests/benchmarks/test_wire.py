"""What counts the wire: the model to the byte on real ranks, and a row too many or too few is noticed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import wire, wire_model
from benchmarks._harness import Missed
from benchmarks._wire_runs import EXPERTS, Way, bytes_sent, layer_on, layout, step
from benchmarks._workloads import workload
from moe_dist.moe.traffic_model import Group, counted_flows
from moe_dist.parallel.grid import build_grid
from moe_dist.parallel.traffic import count_traffic


def counted_and_modelled(way: Way, node_size: int, name: str) -> tuple[list[float], list[float], int]:
    ranks = torch.distributed.get_world_size()
    grid = build_grid(expert=ranks, node_size=node_size)
    ids = workload(name, layout(ranks, tokens=24))
    with count_traffic() as traffic:
        calls = step(layer_on(grid, torch.bfloat16), way, ids[grid.expert_rank])
    group = Group.even(ranks, experts=EXPERTS, node_size=node_size)
    flows = counted_flows(way.dispatcher, group, [ids_TK.numpy() for ids_TK in ids])
    return bytes_sent(calls, grid).tolist(), wire_model.predicted(way, flows, group).tolist(), traffic.bytes()


@pytest.mark.parametrize(
    ("way", "node_size"),
    [
        (Way("alltoall"), 4),
        (Way("dedup", wide_sums=True), 2),
        (Way("node"), 2),
        (Way("node", wide_sums=True, chunks=3), 2),
        (Way("node"), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["W1 hot expert", "W4 ragged"])
def test_the_model_is_right_to_the_byte(ranks, way, node_size, name):
    results = ranks(4, counted_and_modelled, way, node_size, name)
    found, model, _ = results[0]
    assert found == model
    assert sum(found) == sum(counted for _, _, counted in results)  # by the package's own counter
    assert (found[0] > 0) == (node_size > 1)


def checked(altered: bool) -> str:
    """One layer's routing checked as the benchmark does; altered: one token's experts are not those that travelled."""
    grid = build_grid(expert=2, node_size=1)
    layer = layer_on(grid, torch.bfloat16)
    ids = workload("W1 hot expert", layout(2, tokens=8))
    calls = {dispatcher: step(layer, Way(dispatcher), ids[grid.expert_rank]) for dispatcher in ("dedup", "node")}
    if altered:
        ids = [ids[0], ids[1].clone()]
        ids[1][3] = torch.arange(6) + 32  # the hot expert is among the first 32: this token came to both ranks
    _, hits, nodes = wire.demanded(ids, grid)
    found = []
    for check, arguments in (
        (wire.check, ("dedup", 0, calls["dedup"], hits, grid)),
        (wire.check_across, (0, calls["node"], nodes, torch.arange(2).numpy() != grid.expert_rank, grid)),
    ):
        try:
            check(*arguments)
        except Missed as missed:
            found.append(str(missed).split(",")[0])
    return " and ".join(found)


def test_other_rows_than_demanded_are_noticed(ranks):
    assert ranks(2, checked, False) == ["", ""]
    assert ranks(2, checked, True) == ["dedup and node"] * 2


def test_the_table_on_paper():
    rows = {(row["case"], row["peer_name"]): row for row in wire_model.on_paper()}
    one_node = rows["8 GPUs, E64 K8, rows a token", "alltoall"]
    assert (one_node["ours"], one_node["peer"]) == (4.7535, 7.0)  # 7/8 of the 5.4326 ranks that a token draws
    most = rows["1024 GPUs, E256 K8, rows a token across nodes", "dedup"]
    assert most == rows["256 GPUs, E256 K8, rows a token across nodes", "dedup"] | {"case": most["case"]}
    assert 1 < most["ratio"] < rows["16 GPUs, E256 K8, rows a token across nodes", "dedup"]["ratio"]
