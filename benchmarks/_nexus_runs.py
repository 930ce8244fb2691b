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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.logging import disable_progress_bar

from benchmarks._nexus_routers import put_routers
from benchmarks._quality_text import Domain, spaced
from benchmarks._quality_training import drawn, losses_on, train
from moe_dist.config.schema import DataSection, ModelSection, MoeSection, RunConfig, Source
from moe_dist.methods.nexus.config import NexusConfig, NexusSection
from moe_dist.methods.nexus.domains import embed
from moe_dist.methods.nexus.extend import extend
from moe_dist.methods.nexus.upcycle import upcycle
from moe_dist.models import export_model
from moe_dist.models.nexus.configuration_nexus import MODEL_TYPES
from moe_dist.models.skeleton import read_config
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.schedule import learning_rate

ARMS = {
    "dense": "seed, continued",
    "dense_all": "seed, continued for the experts' tokens too",
    "merging": "dense merging",
    "btx": "BTX",
    "linear": "linear",
    "cosine": "linear cosine",
    "mlp": "MLP router of as many parameters",
    "paper": "Nexus, as in the paper",
    "prototype": "Nexus, prototype (default)",
    "no_projection": "prototype, P_r = 0",
    "residual": "residual cosine",
}
UPCYCLED = {
    "merging": {"method": "dense_merging"},
    "btx": {"method": "btx"},
    **{arm: {"method": "linear"} for arm in ("linear", "cosine", "mlp")},
    "paper": {"router": "paper"},
    **{arm: {"router": "prototype"} for arm in ("prototype", "no_projection", "residual")},
}
EXTENSIONS = {
    "reset": "linear, reset (the paper's baseline)",
    "append": "linear, append",
    "centroid": "linear, centroid",
    "cosine": "linear cosine, centroid",
    "paper": "Nexus, as in the paper",
    "renormed": "Nexus, new row as long as the old ones",
    "prototype": "Nexus, prototype (default)",
    "no_projection": "prototype, P_r = 0",
    "residual": "residual cosine",
}
EXTENDED = {  # arm -> (mixture that it begins with, options of the extension)
    **{how: ("linear", {"linear_extend": how}) for how in ("reset", "append", "centroid")},
    "cosine": ("cosine", {"linear_extend": "centroid"}),
    "renormed": ("paper", {"renorm_new": True}),
    **{arm: (arm, {}) for arm in ("paper", "prototype", "no_projection", "residual")},
}
MIXED = tuple(dict.fromkeys(mixture for mixture, _ in EXTENDED.values()))  # mixtures that go on, whose weights are kept


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment. In a stage all arms see the same windows in the same order.

    documents: windows of a domain that its embedding is made from. windows: held-out windows of a domain.
    budgets: steps of an extension after which losses are taken.
    """

    hidden: int = 96
    width: int = 256
    layers: int = 3
    length: int = 128
    batch: int = 16
    seed_steps: int = 1000
    expert_steps: int = 250
    mix_steps: int = 300
    budgets: tuple[int, ...] = (0, 15, 40, 100)
    seed_rate: float = 3e-3
    rate: float = 1e-3
    balance_coef: float = 0.05
    weight_decay: float = 0.1
    documents: int = 256
    windows: int = 32
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
        self.held_out = {n: spaced(d.held_out, settings.windows, settings.length) for n, d in domains.items()}

    def jobs(self) -> list[str]:
        """Names of a seed's trainings, in an order in which each finds what it needs."""
        names = ["seed", *(f"expert-{domain}" for domain in (*self.old, *self.new)), *(f"mix-{arm}" for arm in ARMS)]
        return names + [f"extend-{domain}-{arm}" for domain in self.new for arm in EXTENSIONS]

    def steps(self, job: str) -> int:
        s = self.settings
        if job == "mix-dense_all":
            return len(self.old) * s.expert_steps + s.mix_steps
        stages = {"seed": s.seed_steps, "expert": s.expert_steps, "mix": s.mix_steps, "extend": s.budgets[-1]}
        return stages[job.partition("-")[0]]

    def run(self, seed: int, job: str) -> dict:
        """Do a training; its trace has, by steps done, loss and routing of each domain's held-out windows."""
        kind, _, rest = job.partition("-")
        if kind == "seed":
            return self._seed(seed)
        if kind == "expert":
            return self._expert(seed, rest)
        if kind == "mix":
            return self._mix(seed, rest)
        return self._extend(seed, *rest.split("-"))

    def _seed(self, seed: int) -> dict:
        s, folder = self.settings, self._place(seed, "seed")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**s.architecture()), dtype=torch.float32)
        run = self._train(model, seed, "seed", self.old, stage=0, rate=s.seed_rate)
        self._keep(model, folder)
        byte_tokenizer().save_pretrained(folder)
        documents = self._place(seed, "documents")
        documents.mkdir(exist_ok=True)
        old = self._nexus(seed, documents, self.old)
        embed(old).write(self._place(seed, "domains.safetensors"))
        for domain in self.new:
            new = self._nexus(seed, documents, [domain], same_space_as=str(self._place(seed, "domains.safetensors")))
            embed(new).write(self._place(seed, f"domains-{domain}.safetensors"))
        shutil.rmtree(documents)
        return run

    def _expert(self, seed: int, domain: str) -> dict:
        model = _model(self._place(seed, "seed"))
        stage = 10 + list(self.domains).index(domain)
        run = self._train(model, seed, f"expert-{domain}", [domain], stage=stage, rate=self.settings.rate)
        self._keep(model, self._place(seed, f"expert-{domain}"))
        return run

    def _mix(self, seed: int, arm: str) -> dict:
        torch.manual_seed(seed)  # the MLP router's weights
        folder, job = self._place(seed, f"mix-{arm}"), f"mix-{arm}"
        if arm in UPCYCLED:
            section = self._section(seed, self.old, domains=str(self._place(seed, "domains.safetensors")))
            shutil.rmtree(folder, ignore_errors=True)
            upcycle(NexusConfig(nexus=NexusSection(**section, init_seed=seed, **UPCYCLED[arm])), folder)
            model = _model(folder)
            shutil.rmtree(folder)
            if moe_layers(model):
                put_routers(model, arm, fresh=True)
        else:
            model = _model(self._place(seed, "seed"))
        steps = self.steps(job)
        run = self._train(model, seed, job, self.old, stage=1, rate=self.settings.rate, measured_at=(0, steps))
        if arm in MIXED:
            self._keep(model, folder)
        return run

    def _extend(self, seed: int, domain: str, arm: str) -> dict:
        s, folder, job = self.settings, self._place(seed, f"extend-{domain}-{arm}"), f"extend-{domain}-{arm}"
        mixture, options = EXTENDED[arm]
        section = self._section(seed, [domain], domains=str(self._place(seed, f"domains-{domain}.safetensors")))
        section |= {"model": str(self._place(seed, f"mix-{mixture}")), "init_seed": seed}
        shutil.rmtree(folder, ignore_errors=True)
        extend(NexusConfig(nexus=NexusSection(**section, **options)), folder)
        model = _model(folder)
        shutil.rmtree(folder)
        put_routers(model, arm, fresh=False)
        half = [domain] * len(self.old) + list(self.old)  # half of the windows are the new domain's
        stage = 2 + self.new.index(domain)
        return self._train(model, seed, job, half, stage=stage, rate=s.rate, measured_at=s.budgets, also=domain)

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
        also: str | None = None,
    ) -> dict:
        """Cosine to a tenth of the rate after a tenth of warming up, but an extension at one rate: any of its budgets
        could be the last."""
        s, steps = self.settings, self.steps(job)

        def rate_at(step: int) -> float:
            if job.startswith("extend"):
                return rate
            return learning_rate("cosine", step, peak=rate, total=steps, warmup=max(1, steps // 10), min_ratio=0.1)

        number = 1_000_003 * seed + stage
        rows = drawn([self.domains[name] for name in names], batch=s.batch, length=s.length, seed=number)
        shown = {name: self.held_out[name] for name in (*self.old, *([also] if also else []))}
        routed = bool(moe_layers(model))
        run = train(
            model,
            rows,
            steps=steps,
            rate=rate_at,
            weight_decay=s.weight_decay,
            moe=MoeSection(balance_loss="layer_global", balance_coef=s.balance_coef) if routed else None,
            measure=lambda: self._measure(model, shown),
            measured_at=measured_at,
        )
        return run | {"steps": steps, "parameters": sum(parameter.numel() for parameter in model.parameters())}

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

    def _keep(self, model: nn.Module, folder: Path) -> None:
        folder.parent.mkdir(exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        if model.config.model_type in MODEL_TYPES:
            export_model(model, folder)
        else:
            model.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the byte i; documents end with a zero byte."""
    names = bytes_to_unicode()
    vocabulary = {character: byte for byte, character in names.items()}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=names[0])


def _model(folder: Path) -> nn.Module:
    """A mixture as runs of the framework build it; a dense model is transformers' own."""
    disable_progress_bar()
    if read_config(folder).model_type not in MODEL_TYPES:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = RunConfig(model=ModelSection(path=str(folder)))
    return build_model(config, plan_model(config, Grid.single()), Grid.single())
