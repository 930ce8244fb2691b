"""What ESFT gives and costs in quality, against full fine-tuning, LoRA and controls, on a small model and real text.

A base model of DeepSeek-V2's form (32 experts, 4 a token, one shared) learns bytes of five or six domains; a domain
that it has not seen is the task. Each arm adapts the base on the same windows of the task in the same order. Reported
are held-out losses on the task and on what the base had learned ("general"), over seeds with a base of their own each:

  full                   every parameter trains
  lora                   peft, rank 8, scaling 2, on every matrix but embeddings and head, as in the paper
  lora_2                 the same with rank 2: at this size rank 8 trains a third of the parameters
  token_0.2, token_0.4   ESFT-Token: the experts that cover this share of the task's tokens
  random, least_used     as many experts of each layer as token_0.2 has, but others
  shared                 the shared experts only

Each arm's learning rate is searched on the first seed, by held-out windows of the task that no table shows. Where the
direction of a claim of the paper is tested, the line says what came out, whatever it is.

Every training that is finished is kept in the folder of --work, so that the same command goes on where it stopped. By
default no training begins that would probably end later than --minutes after the start.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import _harness, _quality_figures, _quality_tables
from benchmarks._quality_command import folder_of, parser_of
from benchmarks._quality_figures import job_file
from benchmarks._quality_runs import ARMS, LORA_RANKS, Experiment, Settings
from benchmarks._quality_text import Domain, load_domains
from moe_dist.config.strict_json import write_json
from moe_dist.data.atomic import locked

FORM = 1  # raise it where trainings come out differently: what is kept of the old form is then not used
WORK = Path("runs/benchmarks/esft_quality")
SMOKE = Settings(
    hidden=48,
    width=16,
    layers=2,
    experts=8,
    top_k=2,
    length=32,
    batch=4,
    base_steps=6,
    base_warmup=2,
    rates=(1e-3, 3e-3),
    measured_at=(1, 2, 4),
    task_windows=8,
    general_windows=4,
    score_windows=16,
    megabytes=0.3,
    seeds=(0, 1, 2),
)
SECONDS_A_STEP = {"base": 0.12, "arm": 0.25}  # measuring included; only for the guess when a training would end


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("esft_quality", __doc__, work=WORK, duration="about 30 minutes")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # products this small gain nothing by a second core

    settings = SMOKE if options.smoke else Settings()
    options.work.mkdir(parents=True, exist_ok=True)
    task, domains = load_domains(options.work, megabytes=settings.megabytes)
    folder = folder_of(options.work, identity_of(settings, task, domains))
    experiment = Experiment(settings, task, domains, folder)

    limit = float("inf") if options.full or options.smoke else 60 * options.minutes
    with locked(experiment.folder / "lock"):
        left = work_through(experiment, seconds=limit)
    results = _quality_figures.collect(experiment.folder, settings, arms())
    used = " ".join(f"{name} {number}" for name, number in versions().items())
    made_by = " ".join(["python -m benchmarks.esft_quality", *(sys.argv[1:] if argv is None else argv)])
    print(f"`{made_by}` on {_harness.device()}; {used}\n")
    print(f"Task: {task}. The base learned {', '.join(experiment.general)}. Losses are nats per byte.")
    if options.smoke:
        print("\n**A short run: its figures mean nothing.**")
    if left:
        print(f"\n**{left} trainings or more are left; the same command goes on.**")
    print(_quality_tables.render(results))
    if options.json:
        rows = [row | {"made_by": f"{made_by}; {used}"} for row in _quality_figures.rows(results)]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def identity_of(settings: Settings, task: str, domains: dict[str, Domain]) -> dict:
    """What makes a training another one, but for what is in its file's name."""
    sizes = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("rates", "seeds")}
    prints = {name: domain.fingerprint for name, domain in domains.items()}
    return {"form": FORM, "settings": sizes, "task": task, "domains": prints, "versions": versions()}


def work_through(experiment: Experiment, *, seconds: float) -> int:
    """Do the trainings that are not finished, at least one; the number that are known to be left."""
    start, done = time.perf_counter(), 0
    while jobs := unfinished(experiment):
        seed, arm, rate = jobs[0]
        settings = experiment.settings
        guess = (
            SECONDS_A_STEP["base"] * settings.base_steps if arm == "base" else SECONDS_A_STEP["arm"] * settings.steps
        )
        if done and time.perf_counter() - start + guess > seconds:
            return len(jobs)
        begin = time.perf_counter()
        if arm == "base":
            shutil.rmtree(experiment.base_folder(seed), ignore_errors=True)  # of a run that was stopped
            result = experiment.train_base(seed)
        else:
            result = experiment.adapt(seed, arm, rate)
        result |= {"seed": seed, "arm": arm, "rate": rate, "wall_seconds": round(time.perf_counter() - begin, 1)}
        write_json(job_file(experiment.folder, seed, arm, rate), result)
        print(f"{job_file(experiment.folder, seed, arm, rate).stem}: {result['wall_seconds']} s", file=sys.stderr)
        done += 1
    return 0


def unfinished(experiment: Experiment) -> list[tuple[int, str, float]]:
    """(seed, arm, learning rate) in the order of work: what the search decides comes when it has."""
    settings, folder, jobs = experiment.settings, experiment.folder, []
    for seed in settings.seeds:
        wanted = [("base", settings.base_rate)]
        for arm in arms():
            rates = settings.rates
            if seed != settings.seeds[0]:
                best = _quality_figures.best_rate(folder, settings, arm)
                rates = () if best is None else (best,)
            wanted += [(arm, rate) for rate in rates]
        jobs += [(seed, arm, rate) for arm, rate in wanted if not job_file(folder, seed, arm, rate).is_file()]
    return jobs


def arms() -> list[str]:
    """All arms; without LoRA where there is no peft."""
    return [arm for arm in ARMS if arm not in LORA_RANKS or importlib.util.find_spec("peft")]


def versions() -> dict[str, str]:
    names = ["torch", "transformers", *(["peft"] if "lora" in arms() else [])]
    return {name: version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
