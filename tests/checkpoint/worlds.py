"""A small model laid out over any number of ranks, as an engine would do it, without an engine.

Experts are dealt unevenly to expert-parallel ranks with pad seats; within each, ZeRO cuts one flat buffer of all local
parameters into equal shards, anywhere. Truth is a dictionary of whole global tensors.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field

import torch

from moe_dist.checkpoint import NOT_EXPERT, Fragment, Place, TensorInfo, wanted_for
from moe_dist.checkpoint.fragments import cut_at

KINDS = ("weights", "exp_avg", "exp_avg_sq")
EXPERT_SHAPES = {"layers.0.experts.gate_up_proj": (6, 5), "layers.1.experts.down_proj": (3, 7)}
DENSE_SHAPES = {"embed.weight": (11, 4), "norm.weight": (5,), "scale": ()}
TRAINED = (0, 2, 3, 7, 9)


def catalogue(buffers: bool = False) -> dict[str, TensorInfo]:
    experts = {name: TensorInfo(shape, TRAINED, KINDS) for name, shape in EXPERT_SHAPES.items()}
    dense = {name: TensorInfo(shape, None, KINDS) for name, shape in DENSE_SHAPES.items()}
    counts = {"layers.0.bias": TensorInfo((3,), None, ("buffers",))} if buffers else {}
    return experts | dense | counts


def truth(seed: int = 0) -> dict[tuple[str, str, int], torch.Tensor]:
    """(kind, name, expert) -> the whole flat tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, name, expert): torch.randn(info.numel, generator=generator)
        for name, info in catalogue().items()
        for kind in KINDS
        for expert in info.expert_ids
    }


@dataclass(frozen=True)
class Stack:
    """A local parameter: seats of `numel` elements each."""

    name: str
    seat_ids: tuple[int | None, ...]
    numel: int

    @property
    def size(self) -> int:
        return len(self.seat_ids) * self.numel


@dataclass(frozen=True)
class World:
    """`expert` expert-parallel ranks times `shards` ZeRO shards; rank = expert * shards + shard."""

    expert: int
    shards: int
    seed: int = 0
    seats: tuple[tuple[int | None, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        chance = random.Random(self.seed * 100 + self.expert)
        dealt: list[list[int | None]] = [[] for _ in range(self.expert)]
        for expert in chance.sample(TRAINED, len(TRAINED)):
            dealt[chance.randrange(self.expert)].append(expert)
        most = max(map(len, dealt)) + chance.randrange(2)
        object.__setattr__(self, "seats", tuple(tuple(ids + [None] * (most - len(ids))) for ids in dealt))

    @property
    def size(self) -> int:
        return self.expert * self.shards

    def _buffers(self, rank: int) -> list[tuple[list[Stack], int, int]]:
        """(parameters of a flat buffer, this rank's shard of it, shards of it): experts', then the others'."""
        seats = self.seats[rank // self.shards]
        experts = [Stack(name, seats, TensorInfo(shape).numel) for name, shape in EXPERT_SHAPES.items()]
        dense = [Stack(name, (NOT_EXPERT,), TensorInfo(shape).numel) for name, shape in DENSE_SHAPES.items()]
        return [(experts, rank % self.shards, self.shards), (dense, rank, self.size)]

    def shard(self, rank: int, values: dict, kind: str) -> torch.Tensor:
        """This rank's shards of both buffers, one after the other; padding is zero."""
        parts = []
        for stacks, shard, shards in self._buffers(rank):
            whole = [self._local(stack, values, kind) for stack in stacks]
            flat = torch.cat(whole)
            length = -(-flat.numel() // shards)
            padded = torch.zeros(length * shards)
            padded[: flat.numel()] = flat
            parts.append(padded[shard * length : (shard + 1) * length])
        return torch.cat(parts)

    @staticmethod
    def _local(stack: Stack, values: dict, kind: str) -> torch.Tensor:
        pads = torch.zeros(stack.numel)
        return torch.cat([pads if e is None else values[kind, stack.name, e] for e in stack.seat_ids])

    def cuts(self, rank: int) -> list[tuple[Stack, int, int, int]]:
        """(parameter, offset in it, length, position in the rank's shard) for each parameter that the shard touches."""
        found, base = [], 0
        for stacks, shard, shards in self._buffers(rank):
            total = sum(stack.size for stack in stacks)
            length = -(-total // shards)
            first, last, begin = shard * length, min((shard + 1) * length, total), 0
            for stack in stacks:
                low, high = max(first, begin), min(last, begin + stack.size)
                if low < high:
                    found.append((stack, low - begin, high - low, base + low - first))
                begin += stack.size
            base += length
        return found

    def fragments(self, rank: int, values: dict) -> dict[str, list[Fragment]]:
        pieces: dict[str, list[Fragment]] = {}
        for kind in KINDS:
            flat = self.shard(rank, values, kind)
            pieces[kind] = [
                fragment
                for stack, offset, length, start in self.cuts(rank)
                for fragment in cut_at(
                    wanted_for(stack.name, stack.seat_ids, stack.numel, offset, length), flat[start : start + length]
                )
            ]
        return pieces

    def places(self, rank: int) -> list[Place]:
        return [
            place
            for stack, offset, length, start in self.cuts(rank)
            for place in wanted_for(stack.name, stack.seat_ids, stack.numel, offset, length, at=start)
        ]


class ThreadGroup:
    """Ranks as threads: `gather` by a barrier and a shared list."""

    def __init__(self, rank: int, size: int, board: list, barrier: threading.Barrier) -> None:
        self.rank, self.size, self._board, self._barrier = rank, size, board, barrier

    def gather(self, value):
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values


def on_threads(size: int, work) -> list:
    """`work(group)` on `size` ranks; the result or exception of each. A rank left waiting has a BrokenBarrierError."""
    barrier, board, results = threading.Barrier(size, timeout=60), [None] * size, [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(rank, size, board, barrier))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def saved(root, step: int, world: World, values: dict, **options):
    """Save on threads; returns the folder, raises what rank 0 raised."""
    from moe_dist.checkpoint import save

    def work(group):
        pieces = world.fragments(group.rank, values)
        return save(root, step, pieces, {"step": step}, catalogue=catalogue(), group=group, **options)

    result = on_threads(world.size, work)[0]
    if isinstance(result, BaseException):
        raise result
    return result


def loaded(path, world: World) -> list[dict[str, torch.Tensor]]:
    """By rank: kind -> the shard read back."""
    from moe_dist.checkpoint import open_checkpoint

    shards = []
    with open_checkpoint(path) as checkpoint:
        for rank in range(world.size):
            mine = {}
            for kind in KINDS:
                mine[kind] = torch.zeros_like(world.shard(rank, truth(), kind))
                checkpoint.fill(kind, world.places(rank), mine[kind])
            shards.append(mine)
    return shards
