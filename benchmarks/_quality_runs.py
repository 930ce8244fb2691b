"""The trainings of the experiment on ESFT's quality: base models, and the arms that adapt them to the task.

Everything that `moe_dist` has an answer for goes through it: building and loading, routing losses, engine and
optimizer, scores, selection and controls, the trainable set, held-out loss. LoRA is peft's, on transformers' own model,
which is loaded from the same folder and goes through the same engine.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks._quality_text import Domain, spaced
from benchmarks._quality_training import as_batch, drawn, forward, losses_on, train
from moe_dist.config.expert_files import Summary, read_summary, write_summary
from moe_dist.config.schema import ModelSection, MoeSection, RunConfig, TrainableSection
from moe_dist.methods.esft.score import RoutingScores
from moe_dist.methods.esft.selection import choose, overlap
from moe_dist.models import export_model
from moe_dist.parallel.grid import Grid
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.schedule import learning_rate

ARMS = {
    "full": "full fine-tuning",
    "lora": "LoRA, rank 8",
    "lora_2": "LoRA, rank 2",
    "token_0.2": "ESFT-Token, p=0.2",
    "token_0.4": "ESFT-Token, p=0.4",
    "random": "random experts, as many as p=0.2",
    "least_used": "least used experts, as many as p=0.2",
    "shared": "shared experts only",
}
LORA_RANKS = {"lora": 8, "lora_2": 2}
COVERED = (0.2, 0.4, 0.6)


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment. All arms see the same windows in the same order.

    rates: the learning rates that each arm is searched over. measured_at: steps after which losses are taken.
    task_windows, general_windows: held-out windows of the task (as many again for the search) and of each other domain.
    """

    hidden: int = 96
    width: int = 32
    layers: int = 3
    experts: int = 32
    top_k: int = 4
    length: int = 128
    batch: int = 16
    base_steps: int = 2000
    base_rate: float = 3e-3
    base_warmup: int = 100
    balance_coef: float = 0.01
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    measured_at: tuple[int, ...] = (25, 50, 100, 200)
    weight_decay: float = 0.1
    task_windows: int = 128
    general_windows: int = 32
    score_windows: int = 256
    megabytes: float = 1.4
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def steps(self) -> int:
        return self.measured_at[-1]

    def architecture(self) -> dict:
        """DeepSeek-V2's, every layer with experts: weights of the chosen ones are not normalised, one shared expert."""
        return {
            "model_type": "deepseek_v2",
            "vocab_size": 256,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": self.hidden // 3,
            "qk_nope_head_dim": self.hidden // 6,
            "qk_rope_head_dim": 8,
            "v_head_dim": self.hidden // 4,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.width,
            "intermediate_size": self.width,
            "first_k_dense_replace": 0,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "max_position_embeddings": self.length,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


class Experiment:
    """Settings, text and a folder of base models. `task` is one of `domains`; the base learns the others."""

    def __init__(self, settings: Settings, task: str, domains: dict[str, Domain], folder: Path):
        self.settings, self.task, self.domains, self.folder = settings, task, domains, folder
        self.general = [name for name in domains if name != task]
        length, count = settings.length, settings.task_windows
        both = spaced(domains[task].held_out, 2 * count, length)
        self.held_out = {"search": both[0::2], task: both[1::2]}
        self.held_out |= {n: spaced(domains[n].held_out, settings.general_windows, length) for n in self.general}

    def base_folder(self, seed: int) -> Path:
        return self.folder / f"seed{seed}-base"

    def train_base(self, seed: int) -> dict:
        """Train the base model of a seed on everything but the task, write it and the task's scores, and measure it."""
        s, folder = self.settings, self.base_folder(seed)
        moe = MoeSection(balance_loss="layer_micro", balance_coef=s.balance_coef)
        model = self._model(ModelSection(config=s.architecture(), seed=seed), moe=moe)
        rows = self._rows(self.general, seed=seed, purpose="base")

        def rate(step: int) -> float:
            return learning_rate(
                "cosine", step, peak=s.base_rate, total=s.base_steps, warmup=s.base_warmup, min_ratio=0.1
            )

        run = self._train(model, rows, steps=s.base_steps, rate=rate, moe=moe)
        scores = {name: [self._scores(model, name, half) for half in (0, 1)] for name in self.domains}
        whole = self._scores(model, self.task, None)
        export_model(model, folder)
        write_summary(folder / "scores.json", whole)
        return run | {"losses": self._losses(model), **self._concentration(scores, whole)}

    def adapt(self, seed: int, arm: str, rate: float) -> dict:
        """Adapt the base model of a seed to the task by one arm; parameters that trained, losses along the way."""
        torch.manual_seed(seed)  # LoRA's first matrices
        if arm in LORA_RANKS:
            model = lora_model(self.base_folder(seed), rank=LORA_RANKS[arm])
        else:
            section = self.trainable(seed, arm)
            model = self._model(ModelSection(path=str(self.base_folder(seed))), trainable=section)
        rows = self._rows([self.task], seed=seed, purpose="task")
        run = self._train(
            model, rows, steps=self.settings.steps, rate=lambda step: rate, measured_at=self.settings.measured_at
        )
        return run | {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}

    def trainable(self, seed: int, arm: str) -> TrainableSection:
        """What an arm trains, as the configuration of a run says it."""
        if arm == "full":
            return TrainableSection()
        if arm == "shared":
            return TrainableSection(experts={}, non_expert_modules=False)
        scores = read_summary(self.base_folder(seed) / "scores.json").of_kind("token")
        p = float(arm.removeprefix("token_")) if arm.startswith("token_") else 0.2
        control = arm if arm in ("random", "least_used") else "none"
        config = choose(scores, kind="token", p=p, control=control, seed=seed).config
        return TrainableSection(
            experts=config.experts, shared_experts=config.shared_experts, non_expert_modules=config.non_expert_modules
        )

    def _model(self, section: ModelSection, **sections) -> nn.Module:
        config = RunConfig(model=section, **sections)
        return build_model(config, plan_model(config, Grid.single()), Grid.single())

    def _train(
        self,
        model: nn.Module,
        rows: Iterator[torch.Tensor],
        *,
        steps: int,
        rate: Callable[[int], float],
        moe: MoeSection | None = None,
        measured_at: Sequence[int] = (),
    ) -> dict:
        return train(
            model,
            rows,
            steps=steps,
            rate=rate,
            weight_decay=self.settings.weight_decay,
            moe=moe,
            measure=lambda: self._losses(model),
            measured_at=measured_at,
        )

    def _losses(self, model: nn.Module) -> dict[str, float]:
        """Held-out nats per byte of each domain, and of the task's windows by which learning rates are chosen."""
        found = losses_on(model, self.held_out, self.settings.batch)
        return {name: figures["loss"] for name, figures in found.items()}

    @torch.no_grad()
    def _scores(self, model: nn.Module, domain: str, half: int | None) -> Summary:
        """Scores by a sample of a domain's training text: all over it, or within its first or second half."""
        stream_N = self.domains[domain].train
        if half is not None:
            stream_N = stream_N.chunk(2)[half]
        model.eval()
        with RoutingScores(model) as listener:
            for rows_BL in spaced(stream_N, self.settings.score_windows, self.settings.length).split(64):
                batch = as_batch(rows_BL)
                listener.see(batch)
                forward(model, batch)
        return listener.summary()

    def _concentration(self, scores: dict[str, list[Summary]], whole: Summary) -> dict:
        """How many experts cover a share of the task, and how many of the top K two samples have in common."""
        selected = {str(p): choose(whole.of_kind("token"), p=p).config.experts for p in COVERED}
        tokens = {name: [half.of_kind("token") for half in halves] for name, halves in scores.items()}
        top, pairs = self.settings.top_k, list(itertools.combinations(tokens, 2))
        return {
            "experts_to_cover": {p: mean(len(ids) for ids in layers.values()) for p, layers in selected.items()},
            "selected": {p: {layer: len(ids) for layer, ids in layers.items()} for p, layers in selected.items()},
            "overlap_same": mean(overlap(*halves, top=top) for halves in tokens.values()),
            "overlap_cross": mean(overlap(tokens[a][0], tokens[b][1], top=top) for a, b in pairs),
            "overlap_task": mean(overlap(tokens[self.task][0], tokens[name][1], top=top) for name in self.general),
        }

    def _rows(self, names: list[str], *, seed: int, purpose: str) -> Iterator[torch.Tensor]:
        s, number = self.settings, 1_000_003 * seed + ("base", "task").index(purpose)
        return drawn([self.domains[name] for name in names], batch=s.batch, length=s.length, seed=number)


def lora_model(folder: Path, *, rank: int) -> nn.Module:
    """peft's LoRA on every matrix but embeddings and head, scaling 2, as the paper has it: router, attention, shared
    experts, and each routed expert with pairs of its own.

    By parameters, not modules: from the names of shared experts' modules peft takes it that the routed ones are meant,
    and leaves the shared ones out. The stacked gate and up matrices are one tensor, which gets the rank of both.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder)
    outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices = [name for name, p in model.named_parameters() if p.dim() >= 2 and id(p) not in outside]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[],
        target_parameters=matrices,
        rank_pattern={"gate_up_proj": 2 * rank},
        alpha_pattern={"gate_up_proj": 4 * rank},
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)  # of parameters
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks transformers for it
        return get_peft_model(model, config).train()


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
