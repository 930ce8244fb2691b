"""SIGKILL of either of two ranks at every point of a save: the next start finds the newest whole checkpoint.

The ranks are forked from a server that has torch loaded. The rank that is to die replaces one function of the writer
by one that kills its own process there.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_dist.checkpoint import (
    BackgroundSave,
    TorchGroup,
    background,
    find_latest,
    folders,
    open_checkpoint,
    save,
    tensorfile,
    verify,
    writer,
)
from tests.checkpoint.worlds import World, catalogue, loaded, saved, truth

WORLD = World(2, 1)
GROUP_TIMEOUT_S = 60  # a busy machine; a rank that dies is seen at once


@dataclass(frozen=True)
class Death:
    """Where a rank dies: at the `call`-th call of a function, or in it half-way through its work."""

    module: object
    name: str
    call: int = 1
    newest: int = 1  # the step that the next start must find
    again: bool = False  # the step is there already, so the save replaces it


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


RANK_0 = {
    "before the folder": Death(writer, "new_temporary"),
    "before the coverage check": Death(writer._Save, "_check_coverage"),
    "before the trainer state": Death(writer, "write_stream", call=2),
    "before the manifest": Death(writer, "encode_manifest"),
    "after the manifest": Death(writer, "sync_folder", call=2),
    "before the rename": Death(writer, "publish"),
    "between two renames": Death(folders.os, "rename", call=2, again=True),
    "after the rename": Death(folders, "sync_folder", newest=2),
    "before latest": Death(writer, "point_latest", newest=2),
    "before latest is replaced": Death(folders.os, "replace", newest=2),
}
ANY_RANK = {
    "before writing": Death(writer, "write_layout"),
    "in the middle of a file": Death(tensorfile, "memoryview", call=3),
    "before the index": Death(writer, "write_stream"),
    "after the files": Death(writer, "sync_folder"),
}
BACKGROUND = {"before the commit": Death(background, "finish")}
AT_ONCE, LATER = "at once", "in the background"
CASES = [(where, 0, how) for where in RANK_0 | ANY_RANK for how in (AT_ONCE, LATER)]
CASES += [(where, 1, how) for where in ANY_RANK for how in (AT_ONCE, LATER)]
CASES += [(where, rank, LATER) for where in BACKGROUND for rank in (0, 1)]


def arm(death: Death) -> None:
    real = getattr(death.module, death.name, memoryview)
    left = [death.call]

    def wrapper(*args, **kwargs):
        left[0] -= 1
        return real(*args, **kwargs) if left[0] else die()

    setattr(death.module, death.name, wrapper)


def two_saves(rank: int, root: str, store: str, where: str, victim: int, how: str) -> None:
    timeout = datetime.timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    group = TorchGroup()
    death = (RANK_0 | ANY_RANK | BACKGROUND)[where]

    def at(step: int) -> None:
        pieces = WORLD.fragments(rank, truth(step))
        if how == AT_ONCE:
            save(root, step, pieces, {"step": step}, catalogue=catalogue(), group=group)
        else:
            BackgroundSave(root, step, pieces, {"step": step}, catalogue=catalogue(), group=group).commit()

    at(1)
    if death.again:
        at(2)
    if rank == victim:
        arm(death)
    at(2)


@pytest.fixture(scope="module")
def fork():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.test_kill_in_save"])
    return context


@pytest.mark.parametrize(("where", "victim", "how"), CASES, ids=[f"{w}-rank{v}-{how}" for w, v, how in CASES])
def test_fault_01_kill_in_a_save(tmp_path, fork, where, victim, how):
    death = (RANK_0 | ANY_RANK | BACKGROUND)[where]
    root = tmp_path / "checkpoints"
    processes = [
        fork.Process(target=two_saves, args=(rank, str(root), str(tmp_path / "store"), where, victim, how))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(2 * GROUP_TIMEOUT_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (None, 0), "the survivor must neither hang nor believe that all is well"

    newest = 2 if death.again else death.newest
    found = find_latest(root, clear=True)
    assert found.path == root / f"step-{newest}", found
    assert verify(found.path).ok
    assert_holds(found.path, newest)
    left = {path.name for path in Path(root).iterdir()}
    assert left == {"latest", *(f"step-{step}" for step in range(1, newest + 1))}, "leftovers are cleared"

    again = saved(root, 2, World(1, 1), truth(2))
    assert find_latest(root).path == again
    assert_holds(again, 2)


def assert_holds(path: Path, step: int) -> None:
    (shard,) = loaded(path, World(1, 1))
    whole = World(1, 1)
    for kind, values in shard.items():
        assert values.equal(whole.shard(0, truth(step), kind))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.trainer_state == {"step": step}
