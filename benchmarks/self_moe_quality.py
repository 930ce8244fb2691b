"""What a mixture of LoRA experts gives in quality, against its experts, merges, and training all at once, on real text.

A small dense model (the base) learns bytes of six domains, for a short time. Four of them are skills: on each a LoRA
expert of rank 8 trains from the base. Every arm is then measured on all skills, and on the two domains that no expert
and no router has seen:

  top1, top2, all    MiXSE over the four experts, router trained on all skills, experts frozen
  last               MiXSE, top 1, whose router reads the base's last hidden state
  uniform, random    the same experts without a router: all at 1/4; one drawn for each token
  ties, dare         the experts merged; the best of nine densities and weights, by windows that no table shows
  instance           one LoRA of rank 8 on all skills, for as many steps as experts and router together
  joint              experts and router trained together, for as many steps

The text is real and not written by the model: a model of this size cannot write its own training data. Learning rates
are searched on the first seed: one for experts, one for routers, one each for instance and joint. Where the direction
of a claim of the paper can be tested, the line says what came out, whatever it is.

Every training that is finished is kept in the folder of --work, so that the same command goes on where it stopped. By
default no training begins that would probably end later than --minutes after the start.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks import _harness
from benchmarks._quality_command import folder_of, parser_of
from benchmarks._quality_text import Domain, whole_domains
from benchmarks._self_moe_runs import Experiment, Settings
from benchmarks._self_moe_tables import Results, render, rows
from benchmarks.nexus_quality import work_through
from moe_dist.data.atomic import locked
from moe_dist.errors import UserError

FORM = 1  # raise it where trainings come out differently: what is kept of the old form is then not used
WORK = Path("runs/benchmarks/self_moe_quality")
NAMES = ("python_code", "c", "de", "prose", "en", "perl", "zh", "docstrings", "fr", "cmake", "sv")  # first come
SKILLS, UNSEEN = 4, 2
SMOKE = Settings(
    hidden=48,
    width=64,
    layers=2,
    length=32,
    batch=4,
    rank=2,
    base_steps=6,
    expert_steps=2,
    router_steps=2,
    rates=(1e-3, 3e-3),
    windows=4,
    megabytes=0.3,
)
SMOKE_SKILLS = 2, 1  # and unseen


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("self_moe_quality", __doc__, work=WORK, duration="about half an hour")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # products this small gain nothing by a second core
    disable_progress_bar()

    settings = SMOKE if options.smoke else Settings()
    options.work.mkdir(parents=True, exist_ok=True)
    found = whole_domains(options.work, NAMES, megabytes=settings.megabytes)
    skills, unseen = choose(found, *(SMOKE_SKILLS if options.smoke else (SKILLS, UNSEEN)))
    domains = {name: found[name] for name in (*skills, *unseen)}
    folder = folder_of(options.work, identity_of(settings, skills, unseen, domains))
    experiment = Experiment(settings, skills, unseen, domains, folder)

    limit = float("inf") if options.full or options.smoke else 60 * options.minutes
    with locked(folder / "lock"):
        left = work_through(experiment, seconds=limit)
    made_by = " ".join(["python -m benchmarks.self_moe_quality", *(sys.argv[1:] if argv is None else argv)])
    print(f"`{made_by}` on {_harness.device()}; {' '.join(f'{name} {n}' for name, n in versions().items())}\n")
    print(f"Skills: {', '.join(skills)}; unseen by experts and routers: {', '.join(unseen)}.")
    if options.smoke:
        print("\n**A short run: its figures mean nothing.**")
    if left:
        print(f"\n**{left} trainings are left; the same command goes on.**")
    results = Results(settings, skills, unseen, experiment.finished())
    print(f"\nAll trainings that are finished took {results.minutes():.0f} minutes.\n{render(results)}")
    if options.json:
        made = [row | {"made_by": made_by} for row in rows(results)]
        options.json.write_text(json.dumps(made, indent=1) + "\n")
    return 0


def choose(found: dict[str, Domain], skills: int, unseen: int) -> tuple[list[str], list[str]]:
    """Names of the domains that are skills, and of those that only the base sees; UserError where there are too few."""
    names = [name for name in NAMES if name in found]
    if len(names) < skills + unseen:
        raise UserError(f"text of {len(names)} domains is on this machine; {skills + unseen} are needed of {NAMES}")
    return names[:skills], names[skills : skills + unseen]


def identity_of(settings: Settings, skills: list[str], unseen: list[str], domains: dict[str, Domain]) -> dict:
    """What makes a training another one, but for what is in its file's name."""
    sizes = {key: value for key, value in dataclasses.asdict(settings).items() if key != "seeds"}
    prints = {name: domain.fingerprint for name, domain in domains.items()}
    return {
        "form": FORM,
        "settings": sizes,
        "skills": skills,
        "unseen": unseen,
        "domains": prints,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft")}


if __name__ == "__main__":
    sys.exit(main())
