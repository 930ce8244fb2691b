"""All ranks of a run: they meet, are watched from then on, and are checked before anything is loaded."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from moe_dist.config.checks import axes_of
from moe_dist.config.save import to_dict
from moe_dist.config.schema import RunConfig
from moe_dist.launch.chain import FOLDER
from moe_dist.launch.guard import Guard, guarded
from moe_dist.launch.preflight import (
    Needs,
    agree,
    check_collectives,
    compare_ranks,
    facts_of_one,
    judge_room,
    lines_of,
    report,
)
from moe_dist.parallel.grid import Grid, build_grid
from moe_dist.train import run_folder, state
from moe_dist.train.build import ModelPlan, plan_model
from moe_dist.train.dry_run import memory_of
from moe_dist.train.start import choose_device, form_group, meet, world_size
from moe_dist.train.stop import StopFlag

PLANNED = 1800.0  # seconds in which all ranks have planned the model: its code comes from a shared disk, say


@dataclass
class Together:
    """The ranks of a run. stop: what asks them to stop. guard: what watches over them.

    facts: on rank 0 what the preflight knows of each rank; speed: bytes a second into the run folder.
    """

    grid: Grid
    stop: StopFlag
    guard: Guard
    store: dist.Store | None
    facts: list[dict]
    speed: float = 0.0

    def check_room(self, config: RunConfig, plan: ModelPlan) -> Needs:
        """Whether memory, disk and time suffice for this model; what it needs. Collective.

        Raises UserError or HostFailure on all ranks where they do not.
        """
        trained = state.catalogue(plan).values()
        stored = sum(4 * info.numel * len(info.expert_ids) * len(info.kinds) for info in trained)
        kept, _ = memory_of(config, plan, self.grid)
        needs = Needs(kept.before_activations_total, stored)

        def judge(said: list[dict]) -> list:
            return judge_room(self.facts, needs, speed=self.speed, environ=os.environ)

        if self.store is not None and config.launch.preflight:
            where = {"rank": self.grid.rank, "world": self.grid.world}
            agree(self.store, "room", **where, own={}, judge=judge, patience=PLANNED)
        return needs


@contextmanager
def ranks_together(config: RunConfig) -> Iterator[Together]:
    """Context of a run, from the meeting of its ranks on. Collective.

    Raises HostFailure where ranks do not come or a host does not work, UserError where they are not alike, PeerFailure
    where one is lost in the context.
    """
    device = choose_device()
    launch, rank, world = config.launch, int(os.environ["RANK"]), world_size()
    folder = Path(config.run.dir).absolute()
    store = meet(name=str(folder), timeout=launch.join_timeout)
    watch = guarded(
        rank=rank,
        world=world,
        local_rank=int(os.environ["LOCAL_RANK"]),
        store=store,
        run_dir=folder,
        hang_timeout=launch.hang_timeout,
    )
    with StopFlag(folder / run_folder.STOP_FILE if rank == 0 else None) as stop, watch as guard:
        guard.beat("the preflight")
        facts, speed = [], 0.0
        if world > 1 and launch.preflight:
            facts, speed = compare_ranks(
                store,
                rank=rank,
                world=world,
                device=device,
                folder=folder / FOLDER,
                versions={"python": platform.python_version(), **run_folder.versions()},
                config=to_dict(config),
            )
        guard.beat("forming groups")
        form_group(device, store=store)
        grid = build_grid(**axes_of(config), node_size=config.parallel.node_size, device=device)
        if world > 1 and launch.preflight:
            guard.beat("the preflight")
            check_collectives(store, grid, facts)
        guard.beat("planning the model")
        yield Together(grid, stop, guard, store, facts, speed)


def preflight(config: RunConfig) -> None:
    """What `train` checks before it loads anything, and nothing else; rank 0 prints what was found. Collective.

    Raises UserError or HostFailure on all ranks where something is not as it has to be.
    """
    with ranks_together(config) as ranks:
        needs = ranks.check_room(config, plan_model(config, ranks.grid))
        if ranks.store is None:
            ranks.facts = [facts_of_one(ranks.grid.device, Path(config.run.dir))]
            report(judge_room(ranks.facts, needs, speed=0.0, environ=os.environ))
        for line in lines_of(ranks.facts, needs, ranks.speed):
            print(line, flush=True)
