"""Whether ranks that should hold the same weights do, to the bit: a bad memory chip or a missed reduction shows here.

Each rank sums its bits, tensor by tensor, and the sums are compared over the ranks that hold the same: those of its
family (see `train.family`), and the first and the last stage for a tensor that both have. Under ZeRO 3 no rank holds
what another does, apart from buffers.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.config.save import to_dict
from moe_dist.config.schema import RunConfig
from moe_dist.errors import PolicyStop
from moe_dist.parallel.collectives import sum_over
from moe_dist.parallel.grid import Grid
from moe_dist.parallel.shard import shard_of
from moe_dist.train.family import FAMILIES, family_of, replicas_of
from moe_dist.train.state import stored_buffers
from moe_dist.train.tied import tied_copies

_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22


def check_replicas(model: nn.Module, config: RunConfig, grid: Grid, *, step: int) -> None:
    """Raise PolicyStop, on all ranks alike, naming tensors and ranks, where replicas differ. Collective."""
    if grid.world == 1:
        return
    sums: dict[str, dict[str, torch.Tensor]] = {family: {} for family in FAMILIES}
    for name, tensor in [*model.named_parameters(), *stored_buffers(model)]:
        if not hasattr(tensor, "ds_id") and tensor.numel():
            sums[family_of(tensor)][name] = checksum(tensor.detach())
    odd = _compare({"the configuration": _of_config(config, grid.device)}, None)
    for family, found in sums.items():
        group = replicas_of(family, grid).group
        if group is not None:
            odd += _compare(found, group)
    odd += _compare(_of_tied(model, grid), grid.embedding_group)
    found: list[list[str]] = [[] for _ in range(grid.world)]
    everywhere = torch.tensor(len(odd), device=grid.device)
    dist.all_reduce(everywhere)
    if not everywhere:
        return
    dist.all_gather_object(found, odd)
    lines = list(dict.fromkeys(line for lines in found for line in lines))
    more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
    raise PolicyStop(
        f"at step {step} ranks differ that have to be the same:\n  "
        + "\n  ".join(lines[:10])
        + more
        + "\nGo on from a checkpoint before it, without the host that is named (bad memory is the usual cause). "
        "launch.check_replicas=N checks every N steps"
    )


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Two int64 of a tensor's bits, on its device: their sum, and a sum that depends on their order."""
    bits = tensor.contiguous().view(-1).view(_WORD[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for words in bits.split(_CHUNK):  # as int64 they take several times their memory
        words = words.to(torch.int64)
        places = torch.arange(1, words.numel() + 1, device=bits.device)
        total[0] += words.sum()
        total[1] = total[1] * 31 + (words * places).sum()
    return total


def _of_config(config: RunConfig, device: torch.device) -> torch.Tensor:
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True, default=str).encode()).digest()
    halves = [int.from_bytes(digest[start : start + 8], "big", signed=True) for start in (0, 8)]
    return torch.tensor(halves, device=device)


def _of_tied(model: nn.Module, grid: Grid) -> dict[str, torch.Tensor]:
    """Sums of the tensors that the first and the last stage have both, of all parts where they are cut."""
    parameters, sums = dict(model.named_parameters()), {}
    for copy, origin in tied_copies(model, grid).items():
        tensor = parameters[origin if grid.is_first_stage else copy]
        if not hasattr(tensor, "ds_id"):
            parts = None if shard_of(tensor) is None else grid.tensor_group
            sums[f"{origin} and its copy {copy}"] = sum_over(checksum(tensor), parts)
    return sums


def _compare(sums: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> list[str]:
    """A line for each tensor in which a rank of the group differs from most of them. Collective over the group."""
    if not sums:
        return []
    own = torch.stack(list(sums.values()))
    size = dist.get_world_size(group)
    every = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(every, own, group=group)
    if all(torch.equal(own, other) for other in every):
        return []
    # The group is all of one mind about the sums, so that all of its ranks come here or none.
    hosts: list[str] = [""] * size
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    ranks = list(range(size)) if group is None else dist.get_process_group_ranks(group)
    lines = []
    for index, name in enumerate(sums):
        rows = [tuple(other[index].tolist()) for other in every]
        common, _ = Counter(rows).most_common(1)[0]
        odd = [f"rank {ranks[place]} on {hosts[place]}" for place, row in enumerate(rows) if row != common]
        if odd:
            same = [str(ranks[place]) for place, row in enumerate(rows) if row == common]
            lines.append(f"{name}: {', '.join(odd)} against rank{'s' * (len(same) > 1)} {', '.join(same)}")
    return lines
