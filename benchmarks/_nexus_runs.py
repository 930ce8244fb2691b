"""The trainings of the experiment on Nexus' quality: seed, dense experts, mixtures, and their extensions.

Training, embeddings, upcycling, routers, extension and held-out loss are the framework's. The routers of
`_nexus_routers` take the places of the product's own in models that it has made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks._nexus_arms import ARMS, EXTENDED, EXTENSIONS, MIXED, UPCYCLED
from benchmarks._nexus_models import build, keep
from benchmarks._nexus_routers import put_routers
from benchmarks._nexus_search import score
from benchmarks._quality_text import Domain, spaced
from benchmarks._quality_training import drawn, losses_on, train
from moe_dist.config.schema import DataSection, MoeSection, Source
from moe_dist.config.strict_json import read_json
from moe_dist.methods.nexus.config import NexusConfig, NexusSection
from moe_dist.methods.nexus.domains import embed
from moe_dist.methods.nexus.extend import extend
from moe_dist.methods.nexus.upcycle import upcycle
from moe_dist.models.surgery import moe_layers
from moe_dist.train.schedule import learning_rate


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment. In a stage all arms see the same windows in the same order, at the same learning rate.

    budgets: steps of an extension after which losses are taken. rates: what is searched, see `Experiment.rate`.
    documents: windows of a domain that its embedding is made from. windows: held-out windows of a domain, and as many
    again for the search.
    """

    hidden: int = 96
    width: int = 256
    layers: int = 3
    length: int = 128
    batch: int = 16
    seed_steps: int = 700
    expert_steps: int = 150
    mix_steps: int = 200
    budgets: tuple[int, ...] = (0, 15, 40, 100)
    seed_rate: float = 3e-3
    expert_rate: float = 1e-3
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    balance_coef: float = 0.05
    weight_decay: float = 0.1
    documents: int = 256
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


class Experiment:
    """Settings, text and a folder. `old` domains are learned first; each of `new` then extends the mixtures of them."""

    def __init__(self, settings: Settings, old: Sequence[str], new: Sequence[str], domains: dict[str, Domain], folder):
        self.settings, self.old, self.new, self.domains, self.folder = settings, old, new, domains, Path(folder)
        both = {n: spaced(d.held_out, 2 * settings.windows, settings.length) for n, d in domains.items()}
        self.held_out = {name: rows_BL[1::2] for name, rows_BL in both.items()}
        self.searched = {name: rows_BL[0::2] for name, rows_BL in both.items()}

    def jobs(self, seed: int) -> list[str]:
        """Names of a seed's trainings, in an order in which each finds what it needs."""
        first, rates = seed == self.settings.seeds[0], self.settings.rates
        names = ["seed", *(f"expert-{domain}" for domain in (*self.old, *self.new))]
        names += [f"search-mix-{rate}" for rate in rates if first]
        names += [f"mix-{arm}" for arm in ARMS]
        names += [f"search-extend-{domain}-{rate}" for domain in self.new for rate in rates if first]
        return names + [f"extend-{domain}-{arm}" for domain in self.new for arm in EXTENSIONS]

    def steps(self, job: str) -> int:
        s = self.settings
        if job == "mix-dense_all":
            return len(self.old) * s.expert_steps + s.mix_steps
        stages = {"seed": s.seed_steps, "expert": s.expert_steps, "mix": s.mix_steps, "extend": s.budgets[-1]}
        return stages[job.removeprefix("search-").partition("-")[0]]

    def file(self, seed: int, job: str) -> Path:
        """Where the result of a finished training is kept."""
        return self.folder / f"seed{seed}-{job}.json"

    def finished(self) -> dict[int, dict[str, dict]]:
        """{seed: {name of a training: what came out}}."""
        files = {seed: {job: self.file(seed, job) for job in self.jobs(seed)} for seed in self.settings.seeds}
        return {seed: {job: read_json(f) for job, f in jobs.items() if f.is_file()} for seed, jobs in files.items()}

    def run(self, seed: int, job: str) -> dict:
        """Do a training; its trace has, by steps done, loss and routing of each domain's held-out windows."""
        kind, *names = job.split("-")
        do = {"seed": self._seed, "expert": self._expert, "mix": self._mix, "extend": self._extend}
        return self._search(seed, job, *names) if kind == "search" else do[kind](seed, job, *names)

    def rate(self, stage: str) -> float:
        """The learning rate of a stage, `mix` or `extend`: of `rates` the one that is best for a linear router.

        Tried on the first seed (an extension: with a row appended) and on held-out windows that are in no table.
        """
        jobs = self.finished()[self.settings.seeds[0]]
        return min(self.settings.rates, key=lambda rate: score(jobs, stage, rate, old=self.old, new=self.new))

    def _seed(self, seed: int, job: str) -> dict:
        model = build(config=self.settings.architecture(), seed=seed)
        run = self._train(model, seed, job, self.old, stage=0, rate=self.settings.seed_rate, also=self.new)
        keep(model, self._place(seed, "seed"))
        documents = self._place(seed, "documents")
        documents.mkdir(exist_ok=True)
        old = self._nexus(seed, documents, self.old)
        embed(old).write(self._place(seed, "domains.safetensors"))
        for domain in self.new:
            new = self._nexus(seed, documents, [domain], same_space_as=str(self._place(seed, "domains.safetensors")))
            embed(new).write(self._place(seed, f"domains-{domain}.safetensors"))
        shutil.rmtree(documents)
        return run

    def _expert(self, seed: int, job: str, domain: str) -> dict:
        model = build(path=str(self._place(seed, "seed")))
        stage = 10 + list(self.domains).index(domain)
        run = self._train(model, seed, job, [domain], stage=stage, rate=self.settings.expert_rate, also=self.new)
        keep(model, self._place(seed, job))
        return run

    def _mix(self, seed: int, job: str, arm: str) -> dict:
        model = self._upcycled(seed, arm) if arm in UPCYCLED else build(path=str(self._place(seed, "seed")))
        run = self._train(model, seed, job, self.old, stage=1, rate=self.rate("mix"), measured_at=(0,))
        if arm in MIXED:
            keep(model, self._place(seed, job))
        return run

    def _extend(self, seed: int, job: str, domain: str, arm: str) -> dict:
        return self._train_extended(self._extended(seed, domain, arm), seed, job, domain, rate=self.rate("extend"))

    def _search(self, seed: int, job: str, stage: str, *rest: str) -> dict:
        rate = float(rest[-1])
        if stage == "extend":
            model = self._extended(seed, rest[0], "append")
            return self._train_extended(model, seed, job, rest[0], rate=rate, search=True)
        return self._train(self._upcycled(seed, "linear"), seed, job, self.old, stage=1, rate=rate, search=True)

    def _upcycled(self, seed: int, arm: str) -> nn.Module:
        torch.manual_seed(seed)  # the MLP router's weights
        folder = self._place(seed, f"upcycled-{arm}")
        section = self._section(seed, self.old, domains=str(self._place(seed, "domains.safetensors")))
        shutil.rmtree(folder, ignore_errors=True)
        upcycle(NexusConfig(nexus=NexusSection(**section, init_seed=seed, **UPCYCLED[arm])), folder)
        model = build(path=str(folder))
        shutil.rmtree(folder)
        if moe_layers(model):
            put_routers(model, arm, fresh=True)
        return model

    def _extended(self, seed: int, domain: str, arm: str) -> nn.Module:
        folder, (mixture, options) = self._place(seed, f"extended-{arm}"), EXTENDED[arm]
        section = self._section(seed, [domain], domains=str(self._place(seed, f"domains-{domain}.safetensors")))
        section |= {"model": str(self._place(seed, f"mix-{mixture}")), "init_seed": seed}
        shutil.rmtree(folder, ignore_errors=True)
        extend(NexusConfig(nexus=NexusSection(**section, **options)), folder)
        model = build(path=str(folder))
        shutil.rmtree(folder)
        put_routers(model, arm, fresh=False)
        return model

    def _train_extended(self, model: nn.Module, seed: int, job: str, domain: str, *, rate: float, search=False) -> dict:
        s = self.settings
        half = [domain] * len(self.old) + list(self.old)  # half of the windows are the new domain's
        plan = {"stage": 2 + self.new.index(domain), "rate": rate, "constant": True, "measured_at": s.budgets}
        return self._train(model, seed, job, half, **plan, also=[domain], search=search)

    def _train(
        self,
        model: nn.Module,
        seed: int,
        job: str,
        names: Sequence[str],
        *,
        stage: int,
        rate: float,
        measured_at: Sequence[int] = (),
        also: Sequence[str] = (),
        search: bool = False,
        constant: bool = False,
    ) -> dict:
        """Train on the domains `names`, and measure on the old ones and those in `also`, at the end at least.

        Cosine to a tenth of the rate after a tenth of warming up. constant: one rate; any step could be the last.
        """
        s, steps = self.settings, self.steps(job)

        def rate_at(step: int) -> float:
            if constant:
                return rate
            return learning_rate("cosine", step, peak=rate, total=steps, warmup=max(1, steps // 10), min_ratio=0.1)

        number = 1_000_003 * seed + stage
        rows = drawn([self.domains[name] for name in names], batch=s.batch, length=s.length, seed=number)
        held_out = self.searched if search else self.held_out
        shown = {name: held_out[name] for name in (*self.old, *also)}
        routed = bool(moe_layers(model))
        run = train(
            model,
            rows,
            steps=steps,
            rate=rate_at,
            weight_decay=s.weight_decay,
            moe=MoeSection(balance_loss="layer_global", balance_coef=s.balance_coef) if routed else None,
            measure=lambda: self._measure(model, shown),
            measured_at={*measured_at, steps},
        )
        return run | {
            "steps": steps,
            "rate": rate,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }

    def _measure(self, model: nn.Module, rows: dict[str, torch.Tensor]) -> dict:
        """{"loss": {domain: nats per byte}, "share": {domain: {expert: share of tokens, mean over layers}}}."""
        found = losses_on(model, rows, self.settings.batch)
        share = {}
        for name, figures in found.items():
            if figures["experts"]:
                counts_LE = torch.tensor(list(figures["experts"].values()), dtype=torch.float64)
                share_E = (counts_LE / counts_LE.sum(1, keepdim=True)).mean(0) * model.config.num_experts_per_tok
                share[name] = dict(zip(model.config.expert_names, share_E.tolist(), strict=True))
        return {"loss": {name: figures["loss"] for name, figures in found.items()}, "share": share}

    def _section(self, seed: int, names: Sequence[str], **values) -> dict:
        experts = {name: str(self._place(seed, f"expert-{name}")) for name in names}
        return {"seed": str(self._place(seed, "seed")), "experts": experts, **values}

    def _nexus(self, seed: int, folder: Path, names: Sequence[str], **values) -> NexusConfig:
        """What `nexus embed` is configured by; the domains' windows are written as its documents."""
        s, sources = self.settings, []
        for name in names:
            windows_BL = spaced(self.domains[name].train, s.documents, s.length)
            texts = [bytes(row_L.tolist()).decode("utf-8", errors="ignore") for row_L in windows_BL]
            file = folder / f"{name}.jsonl"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            sources.append(Source(path=str(file), name=name))
        data = DataSection(train=sources, seq_len=s.length, cache_dir=str(folder / "cache"))
        nexus = NexusSection(seed=str(self._place(seed, "seed")), documents=s.documents, **values)
        return NexusConfig(data=data, nexus=nexus)

    def _place(self, seed: int, name: str) -> Path:
        return self.folder / f"seed{seed}" / name
