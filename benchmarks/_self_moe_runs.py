"""The trainings of the experiment on Self-MoE's quality: base, specialists, mixtures and what they are compared with.

LoRA, composing, merging, routers, training and held-out loss are the framework's.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks._nexus_models import keep
from benchmarks._quality_text import Domain, spaced
from benchmarks._quality_training import drawn, losses_on, train
from benchmarks._self_moe_arms import COMPOSED, MADE, MERGED, ROUTED
from moe_dist.checkpoint import fingerprint
from moe_dist.config.schema import LoraSection, ModelSection, RunConfig, TrainableSection
from moe_dist.config.strict_json import read_json
from moe_dist.methods.self_moe.composition.compose import compose
from moe_dist.methods.self_moe.composition.config import ComposeConfig, ComposeSection
from moe_dist.models.adapter import write_lora
from moe_dist.models.lora import injected_config
from moe_dist.models.mixse import RoutingRecorder
from moe_dist.parallel.grid import Grid
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.schedule import learning_rate

ROUTER, EXPERTS = "mixse_router.*", "*.experts_*"


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment. rates: what is searched on the first seed, for each kind of training. windows: held-out
    windows of a domain, and as many again for the search."""

    hidden: int = 96
    width: int = 256
    layers: int = 3
    length: int = 128
    batch: int = 16
    rank: int = 8
    base_steps: int = 400
    expert_steps: int = 150
    router_steps: int = 100
    base_rate: float = 3e-3
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    weight_decay: float = 0.0
    windows: int = 24
    megabytes: float = 1.4
    seeds: tuple[int, ...] = field(default=(0, 1, 2))

    def architecture(self) -> dict:
        return {
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": self.length,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }

    def lora(self, seed: int) -> LoraSection:
        return LoraSection(rank=self.rank, alpha=2.0 * self.rank, seed=seed)


class Experiment:
    """Settings, text and a folder. The base learns all domains, for a short time; of `skills` there are experts, and
    what is trained on all skills never sees the `unseen` ones."""

    def __init__(
        self, settings: Settings, skills: Sequence[str], unseen: Sequence[str], domains: dict[str, Domain], at
    ):
        self.settings, self.skills, self.unseen, self.domains = settings, list(skills), list(unseen), domains
        self.folder = Path(at)
        both = {n: spaced(d.held_out, 2 * settings.windows, settings.length) for n, d in domains.items()}
        self.held_out = {name: rows_BL[1::2] for name, rows_BL in both.items()}
        self.searched = {name: rows_BL[0::2] for name, rows_BL in both.items()}

    def jobs(self, seed: int) -> list[str]:
        """Names of a seed's trainings, in an order in which each finds what it needs."""
        rates = self.settings.rates if seed == self.settings.seeds[0] else ()
        names = ["base", *(f"search-expert-{skill}-{rate}" for skill in self.skills for rate in rates)]
        names += [f"expert-{skill}" for skill in self.skills]
        for arm in ("instance", "joint"):
            names += [*(f"search-{arm}-{rate}" for rate in rates), arm]
        names += [f"search-top1-{rate}" for rate in rates]
        return names + list(ROUTED) + list(MADE)

    def steps(self, job: str) -> int:
        s = self.settings
        kind = job.removeprefix("search-").partition("-")[0]
        whole = len(self.skills) * s.expert_steps + s.router_steps
        return {"base": s.base_steps, "expert": s.expert_steps, "instance": whole, "joint": whole}.get(
            kind, s.router_steps if kind in ROUTED else 0
        )

    def file(self, seed: int, job: str) -> Path:
        """Where the result of a finished training is kept."""
        return self.folder / f"seed{seed}-{job}.json"

    def finished(self) -> dict[int, dict[str, dict]]:
        """{seed: {name of a training: what came out}}."""
        files = {seed: {job: self.file(seed, job) for job in self.jobs(seed)} for seed in self.settings.seeds}
        return {seed: {job: read_json(f) for job, f in jobs.items() if f.is_file()} for seed, jobs in files.items()}

    def run(self, seed: int, job: str) -> dict:
        """Do a training, or make what needs none; measured at its end."""
        kind, *names = job.split("-")
        if kind == "search":
            *what, rate = names
            return self._arm(seed, "-".join(what), rate=float(rate), search=True)
        if kind == "base":
            model = self._build(config=self.settings.architecture(), seed=seed)
            run = self._train(model, seed, job, list(self.domains), rate=self.settings.base_rate)
            keep(model, self._place(seed, "base"))
            return run
        if kind in MERGED:
            return self._merge(seed, kind)
        return self._arm(seed, job, rate=self.rate(kind) if self.steps(job) else 0.0, search=False)

    def rate(self, kind: str) -> float:
        """Of `rates` the one with the lowest loss on the windows of the search, by the first seed: one for all experts,
        one for all routers over trained experts."""
        jobs = self.finished()[self.settings.seeds[0]]
        name = "top1" if kind in ROUTED else kind

        def score(rate: float) -> float:
            if kind == "expert":
                return sum(jobs[f"search-expert-{skill}-{rate}"]["loss"][skill] for skill in self.skills)
            return sum(jobs[f"search-{name}-{rate}"]["loss"][skill] for skill in self.skills)

        return min(self.settings.rates, key=score)

    def _arm(self, seed: int, job: str, *, rate: float, search: bool) -> dict:
        kind, _, skill = job.partition("-")
        if kind not in ("expert", "instance"):
            model = self._composed(seed, kind)
            return self._train(model, seed, job, self.skills, rate=rate, search=search)
        base = self._place(seed, "base")
        model = self._build(path=str(base), lora=self.settings.lora(seed))
        run = self._train(model, seed, job, [skill] if skill else self.skills, rate=rate, search=search)
        if skill and not search:
            shutil.rmtree(self._place(seed, job), ignore_errors=True)
            tensors = {name: tensor.detach() for name, tensor in model.named_parameters() if ".lora_" in name}
            manifest = {"base": {"model": str(base), "fingerprint": fingerprint(base)}}
            write_lora(self._place(seed, job), injected_config(model), tensors, manifest)
        return run

    def _merge(self, seed: int, arm: str) -> dict:
        """The best of several densities and weights, on the windows of the search."""
        densities, weights = MERGED[arm]
        tried = {}
        for density in densities:
            for weight in weights:
                model = self._composed(seed, arm, method=arm, density=density, weight=weight)
                losses = self._measure(model, self.searched)["loss"]
                tried[density, weight] = sum(losses[skill] for skill in self.skills) / len(self.skills)
        density, weight = min(tried, key=tried.get)
        model = self._composed(seed, arm, method=arm, density=density, weight=weight)
        found = {"density": density, "weight": weight, "published": tried[densities[0], weights[0]]}
        return self._measure(model, self.held_out) | found | {"chosen": tried[density, weight], "parameters": 0}

    def _composed(self, seed: int, arm: str, **options) -> nn.Module:
        """A model of the base and the seed's experts, as `moe-dist self-moe compose` makes it."""
        folder = self._place(seed, f"composed-{arm}")
        shutil.rmtree(folder, ignore_errors=True)
        options = {**COMPOSED.get(arm, {}), "seed": seed, **options}
        if options.get("top_k", 1) is None:
            options["top_k"] = len(self.skills)
        if arm == "joint":
            options["skills"] = self.skills
        else:
            options["experts"] = {skill: str(self._place(seed, f"expert-{skill}")) for skill in self.skills}
        section = ComposeSection(base=str(self._place(seed, "base")), **options)
        compose(ComposeConfig(compose=section, lora=self.settings.lora(seed)), folder)
        trains = {"joint": [ROUTER, EXPERTS], **{name: [ROUTER] for name in ROUTED}}.get(arm)
        model = self._build(path=str(folder), include=trains)
        shutil.rmtree(folder)
        return model

    def _build(self, *, lora: LoraSection | None = None, include: list[str] | None = None, **model) -> nn.Module:
        trainable = TrainableSection() if include is None else TrainableSection(include=include)
        config = RunConfig(model=ModelSection(**model), lora=lora or LoraSection(), trainable=trainable)
        return build_model(config, plan_model(config, Grid.single()), Grid.single())

    def _train(
        self, model: nn.Module, seed: int, job: str, names: Sequence[str], *, rate: float, search: bool = False
    ) -> dict:
        """Train on the domains `names`, which share out the windows evenly: cosine to a tenth of the rate after a tenth
        of warming up. All arms on all skills see the same windows in the same order, from the beginning."""
        s, steps = self.settings, self.steps(job)
        number = 1_000_003 * seed + (0 if job == "base" else 1 if len(names) > 1 else 10 + self.skills.index(names[0]))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if steps:
            train(
                model,
                drawn([self.domains[name] for name in names], batch=s.batch, length=s.length, seed=number),
                steps=steps,
                rate=lambda step: learning_rate(
                    "cosine", step, peak=rate, total=steps, warmup=max(1, steps // 10), min_ratio=0.1
                ),
                weight_decay=s.weight_decay,
            )
        found = self._measure(model, self.searched if search else self.held_out)
        return found | {"steps": steps, "rate": rate, "parameters": trained if steps else 0}

    def _measure(self, model: nn.Module, rows: dict[str, torch.Tensor]) -> dict:
        """{"loss": {domain: nats per byte}, "share": {domain: {expert: share of tokens that it is first for}}}."""
        loss, share = {}, {}
        for name, rows_BL in rows.items():
            if getattr(model, "mixse", None) is None:
                loss[name] = losses_on(model, {name: rows_BL}, self.settings.batch)[name]["loss"]
                continue
            with RoutingRecorder(model) as recorder:
                loss[name] = losses_on(model, {name: rows_BL}, self.settings.batch)[name]["loss"]
            share[name] = {expert: found["first"] for expert, found in recorder.shares().items()}
        return {"loss": loss, "share": share}

    def _place(self, seed: int, name: str) -> Path:
        return self.folder / f"seed{seed}" / name
