"""What Nexus gives in quality when dense experts become a mixture, and when an expert is added, on real text.

A small dense model (the seed) learns bytes of up to eight domains, one dense expert trains from it on each, and every
arm goes on from there for the same tokens on all of them:

  dense, dense_all   the seed for the mixture's tokens; and for those of the experts besides
  merging, btx       the mean of all dense models; Branch-Train-MiX
  linear, cosine     seed MLP shared, a row a weight; the same with logits that are cosines
  mlp                a router of two layers that has as many parameters as the paper's projection
  paper, prototype   Nexus, with the paper's router and with the default
  no_projection      prototype with P_r = 0
  residual           prototype as a cosine of the centred token

Then two domains that nothing has seen each extend the mixtures by an expert; half of the training is the new domain's.
Reported are losses at several budgets, and what the new expert gets. Rows of a linear router are reset (the paper's
baseline), appended, or put at the domain's centroid. Where the direction of a claim can be tested, the line says what
came out, whatever it is. All arms of a stage train at one learning rate: the one that suits a linear router best.

Every training that is finished is kept in the folder of --work, so that the same command goes on where it stopped. By
default no training begins that would probably end later than --minutes after the start.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import _harness
from benchmarks._nexus_claims import rows
from benchmarks._nexus_results import Results
from benchmarks._nexus_runs import Experiment, Settings
from benchmarks._nexus_tables import render
from benchmarks._quality_command import folder_of, parser_of
from benchmarks._quality_text import Domain, whole_domains
from moe_dist.config.strict_json import write_json
from moe_dist.data.atomic import locked
from moe_dist.errors import UserError

FORM = 2  # raise it where trainings come out differently: what is kept of the old form is then not used
WORK = Path("runs/benchmarks/nexus_quality")
OLD = ("python_code", "c", "de", "prose", "en", "zh", "cmake", "sv", "docstrings")  # the first eight that there are
NEW = ("fr", "perl")
SMOKE = Settings(
    hidden=48,
    width=64,
    layers=2,
    length=32,
    batch=4,
    seed_steps=6,
    expert_steps=2,
    mix_steps=3,
    budgets=(0, 1, 2),
    documents=8,
    windows=4,
    megabytes=0.3,
)
SMOKE_DOMAINS = 3, 1  # old and new
SECONDS_A_STEP = 0.15  # only for the guess when a training would end


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("nexus_quality", __doc__, work=WORK, duration="under an hour")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # products this small gain nothing by a second core

    settings = SMOKE if options.smoke else Settings()
    options.work.mkdir(parents=True, exist_ok=True)
    found = whole_domains(options.work, {*OLD, *NEW}, megabytes=settings.megabytes)
    old, new = choose(found, *(SMOKE_DOMAINS if options.smoke else (8, 2)))
    domains = {name: found[name] for name in (*old, *new)}
    folder = folder_of(options.work, identity_of(settings, old, new, domains))
    experiment = Experiment(settings, old, new, domains, folder)

    limit = float("inf") if options.full or options.smoke else 60 * options.minutes
    with locked(folder / "lock"):
        left = work_through(experiment, seconds=limit)
    made_by = " ".join(["python -m benchmarks.nexus_quality", *(sys.argv[1:] if argv is None else argv)])
    print(f"`{made_by}` on {_harness.device()}; {' '.join(f'{name} {n}' for name, n in versions().items())}\n")
    print(f"Domains: {', '.join(old)}; new ones: {', '.join(new)}. Losses are nats per byte.")
    if options.smoke:
        print("\n**A short run: its figures mean nothing.**")
    elif len(domains) < 8:
        print(f"\n**Only {len(domains)} domains of text are on this machine: fewer than the eight that are meant.**")
    if left:
        print(f"\n**{left} trainings are left; the same command goes on.**")
    results = Results(settings, old, new, experiment.finished())
    print(f"\nAll trainings that are finished took {results.minutes():.0f} minutes.\n{render(results)}")
    if options.json:
        made = [row | {"made_by": made_by} for row in rows(results)]
        options.json.write_text(json.dumps(made, indent=1) + "\n")
    return 0


def choose(found: dict[str, Domain], most_old: int, most_new: int) -> tuple[list[str], list[str]]:
    """Names of the domains that are learned first and of those that come later; UserError where there are too few."""
    old = [name for name in OLD if name in found]
    new = [name for name in NEW if name in found][:most_new] or old[2:][-1:]
    old = [name for name in old if name not in new][:most_old]
    if len(old) < 2 or not new:
        raise UserError(f"text of {len(found)} domains is on this machine; three are needed of {', '.join(OLD + NEW)}")
    return old, new


def identity_of(settings: Settings, old: list[str], new: list[str], domains: dict[str, Domain]) -> dict:
    """What makes a training another one, but for what is in its file's name."""
    sizes = {key: value for key, value in dataclasses.asdict(settings).items() if key != "seeds"}
    prints = {name: domain.fingerprint for name, domain in domains.items()}
    return {"form": FORM, "settings": sizes, "old": old, "new": new, "domains": prints, "versions": versions()}


def work_through(experiment: Experiment, *, seconds: float) -> int:
    """Do the trainings that are not finished, at least one; the number that are left."""
    start = time.perf_counter()
    seeds = experiment.settings.seeds
    left = [(seed, job) for seed in seeds for job in experiment.jobs(seed) if not experiment.file(seed, job).is_file()]
    for done, (seed, job) in enumerate(left):
        guess = SECONDS_A_STEP * experiment.steps(job)
        if done and time.perf_counter() - start + guess > seconds:
            return len(left) - done
        begin = time.perf_counter()
        result = experiment.run(seed, job) | {"wall_seconds": round(time.perf_counter() - begin, 1)}
        write_json(experiment.file(seed, job), result)
        print(f"seed {seed}, {job}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return 0


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


if __name__ == "__main__":
    sys.exit(main())
