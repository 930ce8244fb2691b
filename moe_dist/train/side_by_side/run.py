"""Training the experts of a plan, several at a time where there are ranks for it.

Each expert is an ordinary run in `run.dir`/runs/NAME; its export appears as `run.dir`/NAME when it is trained. The
ranks of the launch are cut into groups, each a world of its own (see `train.worlds`), and the experts are dealt out to
them in turn.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TextIO

from moe_dist.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from moe_dist.train import run_folder
from moe_dist.train.dry_run import describe as describe_run
from moe_dist.train.finished import evaluate_run, export_run
from moe_dist.train.loop import train
from moe_dist.train.side_by_side.losses import keep_start_figures, report, start_figures
from moe_dist.train.side_by_side.plan import RUNS, SideBySide
from moe_dist.train.start import on_rank_zero, start_ranks, world_size
from moe_dist.train.worlds import Worlds, split

START = ".start"  # no name of an expert


def describe(plan: SideBySide, ranks: int) -> str:
    """The text of `--dry-run` for that many ranks: which group trains what, and every expert's run."""
    hands = plan.deal(ranks)
    size = ranks // len(hands)
    lines = [f"{ranks} rank(s) as {len(hands)} group(s) of {size}"]
    lines += [f"group {index}  {', '.join(names)}" for index, names in enumerate(hands, 1)]
    return "\n".join(lines) + "".join(f"\n\n{describe_run(run, size)}" for run in plan.experts.values())


def train_side_by_side(plan: SideBySide, *, check: Callable[[], object]) -> int:
    """Train and export all experts, or go on with it. Collective: every rank of the launch calls it.

    check: looks at the model that all start from, before the first step; called on rank 0. An expert whose folder is
    there is left alone, one that was cut off goes on from its last checkpoint. Returns the exit code: 0, or 85 where a
    signal stopped it after a save. Raises UserError for what is wrong with the input; PeerFailure where an expert of
    another group has failed.
    """
    device = start_ranks()
    hands = plan.deal(world_size())
    made = on_rank_zero(lambda: _check(plan, check))
    with split(len(hands), device) as worlds:
        done = _train_experts(plan, hands[worlds.index], made, worlds)
        # The last group has the fewest experts.
        if done and worlds.index == worlds.count - 1 and START not in made:
            worlds.at(f"the {plan.terms.start}")
            with _labelled(plan.terms.start):
                _evaluate_start(plan)
        worlds.at("done")
    if not done or worlds.stopped:
        return EXIT_PREEMPTED
    on_rank_zero(lambda: print(report(plan), flush=True))
    return EXIT_OK


def _train_experts(plan: SideBySide, names: Sequence[str], made: Sequence[str], worlds: Worlds) -> bool:
    """Train and export this group's experts, one after the other; whether all of them are there now."""
    for name in names:
        if name in made:
            continue
        worlds.at(f"expert {name}")
        if worlds.stopped:
            return False
        config = plan.experts[name]
        with _labelled(name):
            if train(config) != EXIT_OK:
                worlds.stop(f"expert {name}")
                return False
            on_rank_zero(partial(_export, config.run.dir, plan.out / name))
        gc.collect()  # engines hold themselves in circles, and the next expert needs the memory
    return True


def _check(plan: SideBySide, check: Callable[[], object]) -> list[str]:
    """Look at everything before the first step; what is there already: experts, and START where it has been evaluated.

    Raises UserError where the start is not fit, or a folder holds something else. For rank 0.
    """
    check()
    made = []
    for name, config in plan.experts.items():
        folder, begun = plan.out / name, run_folder.check(config, resume="auto", overwrite=False) is not None
        if begun and (folder / plan.terms.marker).is_file():
            made.append(name)
        elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} is not empty and holds no expert of this configuration: choose another run.dir")
    for name in made:
        print(f"{name}: made before, skipped", flush=True)
    data = plan.start.data
    domains = {source.name for source in data.eval or (data.train if data.eval_fraction else [])}
    return made + ([START] if domains <= start_figures(plan).keys() else [])


def _export(run: str, out: Path) -> None:
    export_run(run, out)
    print(f"wrote {out}", flush=True)


def _evaluate_start(plan: SideBySide) -> None:
    config = deepcopy(plan.start)
    config.run.dir = str(plan.out / RUNS / START)  # where no run is, so that the model is taken as it is
    _, figures = evaluate_run(config)
    on_rank_zero(lambda: keep_start_figures(plan, figures))


@contextmanager
def _labelled(label: str) -> Iterator[None]:
    """Every line that is printed begins with `label`: the groups of a launch share a terminal."""
    with redirect_stdout(_Labelled(sys.stdout, label)), redirect_stderr(_Labelled(sys.stderr, label)):
        yield


class _Labelled:
    """A text stream that passes whole lines on. It is no terminal, so nobody draws a progress bar on it."""

    def __init__(self, stream: TextIO, label: str):
        self._stream, self._label, self._rest = stream, label, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._stream.write(f"{self._label}: {line}\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False
