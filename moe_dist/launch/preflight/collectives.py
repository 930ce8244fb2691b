"""An all-reduce and an all-to-all of known results on every group of the grid, and a product on the device."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moe_dist.launch.preflight.compare import Finding
from moe_dist.parallel.collectives import exchange
from moe_dist.parallel.grid import Grid

LENGTH = 1 << 14


def wrong_results(grid: Grid) -> list[str]:
    """What this rank got that it should not have, a line each; empty on a healthy machine. Collective."""
    wrong = [] if _product(grid.device) else [f"a product of matrices on {grid.device} is wrong"]
    groups = {
        "all ranks": dist.group.WORLD,
        "the pipeline stage": grid.stage_group,
        "the data group": grid.data_group,
        "the sequence group": grid.sequence_group,
        "the tensor group": grid.tensor_group,
        "the group that shares rows": grid.slice_group,
        "the group with the same part of cut tensors": grid.tensor_data_group,
        "the expert group": grid.expert_group,
        "the expert-data group": grid.expert_data_group,
        "the pipeline group": grid.pipeline_group,
    }
    done = []
    for name, group in groups.items():
        if group is None or any(group is other for other in done):
            continue
        done.append(group)
        if not _all_reduce(group, grid.device):
            wrong.append(f"an all-reduce over {name} gives wrong values")
        if not _all_to_all(group, grid.device):
            wrong.append(f"an all-to-all over {name} gives wrong rows")
    return wrong


def judge_results(said: list[dict], hosts: list[str]) -> list[Finding]:
    """Findings from what each rank got; a rank whose own device computes wrongly is the one to blame."""
    findings = [
        Finding("failed", f"rank {rank} on {hosts[rank]}: {line}; leave this host out and start again")
        for rank, answer in enumerate(said)
        for line in answer["wrong"]
    ]
    return sorted(findings, key=lambda finding: "product" not in finding.text)


def _product(device: torch.device) -> bool:
    """Small integers, exact in every arithmetic that a device may use for fp32."""
    n = 64
    a = (torch.arange(n * n, device=device).view(n, n) % 7).float()
    b = torch.eye(n, device=device).roll(1, 0) * 2
    return torch.equal(a @ b, a.roll(-1, 1) * 2)


def _all_reduce(group: dist.ProcessGroup, device: torch.device) -> bool:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    pattern = torch.arange(LENGTH, device=device).float() % 251
    got = pattern * (rank + 1)
    dist.all_reduce(got, group=group)
    return torch.equal(got, pattern * (size * (size + 1) / 2))


def _all_to_all(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Rank i sends (i + 2j) mod 3 rows of value 1000 i + j to rank j: uneven, some of them none."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    send = [(rank + 2 * other) % 3 for other in range(size)]
    receive = [(other + 2 * rank) % 3 for other in range(size)]
    rows = torch.tensor([1000 * rank + other for other, count in enumerate(send) for _ in range(count)], device=device)
    got = exchange(rows.float().view(-1, 1).expand(-1, 64), send, receive, group, what="preflight")
    wanted = [1000 * other + rank for other, count in enumerate(receive) for _ in range(count)]
    return torch.equal(got, torch.tensor(wanted, device=device).float().view(-1, 1).expand(-1, 64))
