"""Branching: a dense expert for each domain, trained from the seed, several at a time where there are ranks for it.

Each expert is an ordinary run (see `branch_config`), in `run.dir`/runs/DOMAIN; its model appears as `run.dir`/DOMAIN
when it is trained. The ranks of the launch are cut into groups, each a world of its own (see `train.worlds`), and the
experts are dealt out to them in turn.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TextIO

from moe_dist.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from moe_dist.methods.nexus.branch_config import RUNS, Branching
from moe_dist.methods.nexus.branch_report import keep_seed_figures, report, seed_figures
from moe_dist.methods.nexus.folders import open_dense
from moe_dist.train import run_folder
from moe_dist.train.dry_run import describe as describe_run
from moe_dist.train.finished import evaluate_run, export_run
from moe_dist.train.loop import train
from moe_dist.train.start import on_rank_zero, start_ranks, world_size
from moe_dist.train.worlds import Worlds, split

SEED = ".seed"  # no name of a domain


def describe(branching: Branching, ranks: int) -> str:
    """The text of `--dry-run` for that many ranks: which group trains what, and every expert's run."""
    hands = branching.deal(ranks)
    size = ranks // len(hands)
    lines = [f"{ranks} rank(s) as {len(hands)} group(s) of {size}"]
    lines += [f"group {index}  {', '.join(names)}" for index, names in enumerate(hands, 1)]
    return "\n".join(lines) + "".join(f"\n\n{describe_run(run, size)}" for run in branching.experts.values())


def branch(branching: Branching) -> int:
    """Train and export all experts, or go on with it. Collective: every rank of the launch calls it.

    An expert whose folder is there is left alone, one that was cut off goes on from its last checkpoint. Returns the
    exit code: 0, or 85 where a signal stopped it after a save. Raises UserError for what is wrong with the input;
    PeerFailure where an expert of another group has failed.
    """
    device = start_ranks()
    hands = branching.deal(world_size())
    made = on_rank_zero(lambda: _check(branching))
    with split(len(hands), device) as worlds:
        done = _train_experts(branching, hands[worlds.index], made, worlds)
        # The last group has the fewest experts.
        if done and worlds.index == worlds.count - 1 and SEED not in made:
            worlds.at("the seed")
            with _labelled("seed"):
                _evaluate_seed(branching)
        worlds.at("done")
    if not done or worlds.stopped:
        return EXIT_PREEMPTED
    runs = {name: Path(config.run.dir) for name, config in branching.experts.items()}
    on_rank_zero(lambda: print(report(branching.out, runs), flush=True))
    return EXIT_OK


def _train_experts(branching: Branching, names: Sequence[str], made: Sequence[str], worlds: Worlds) -> bool:
    """Train and export this group's experts, one after the other; whether all of them are there now."""
    for name in names:
        if name in made:
            continue
        worlds.at(f"expert {name}")
        if worlds.stopped:
            return False
        config = branching.experts[name]
        with _labelled(name):
            if train(config) != EXIT_OK:
                worlds.stop(f"expert {name}")
                return False
            on_rank_zero(partial(_export, config.run.dir, branching.out / name))
        gc.collect()  # engines hold themselves in circles, and the next expert needs the memory
    return True


def _check(branching: Branching) -> list[str]:
    """Look at everything before the first step; what is there already: domains, and SEED where it has been evaluated.

    Raises UserError where the seed cannot be upcycled later, or a folder holds something else. For rank 0.
    """
    open_dense("seed", branching.seed.model.path)
    made = []
    for name, config in branching.experts.items():
        folder, begun = branching.out / name, run_folder.check(config, resume="auto", overwrite=False) is not None
        if begun and (folder / "config.json").is_file():
            made.append(name)
        elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} is not empty and holds no expert of this branching: choose another run.dir")
    for name in made:
        print(f"{name}: made before, skipped", flush=True)
    data = branching.seed.data
    domains = {source.name for source in data.eval or (data.train if data.eval_fraction else [])}
    return made + ([SEED] if domains <= seed_figures(branching.out).keys() else [])


def _export(run: str, out: Path) -> None:
    export_run(run, out)
    print(f"wrote {out}", flush=True)


def _evaluate_seed(branching: Branching) -> None:
    config = deepcopy(branching.seed)
    config.run.dir = str(branching.out / RUNS / SEED)  # where no run is, so that the model is taken as it is
    _, figures = evaluate_run(config)
    on_rank_zero(lambda: keep_seed_figures(branching.out, figures))


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
