"""DeepSeek-V2-Lite scaled down, trained in four ways: the arms of `esft_step`.

Every arm is the model that `moe-dist train` builds from a configuration, behind the engine without DeepSpeed: weights
in bf16, fp32 masters, gradients and moments for what trains. All have the same weights, tokens and routing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from moe_dist.config.expert_files import ExpertConfig, read_expert_config
from moe_dist.config.load import build
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.engine import Engine, build_engine
from moe_dist.train.losses import count_labels, label_loss_sum

EXPERTS, TOP_K, RANK = 64, 6, 8


@dataclass(frozen=True)
class Task:
    """What all arms share.

    scale: divides the widths of DeepSeek-V2-Lite and its vocabulary. chosen: what ESFT trains. ids_LTK: the experts
    that each token goes to in each MoE layer, in place of the random router's choice. tokens_BL: the batch.
    """

    scale: int
    chosen: ExpertConfig
    ids_LTK: torch.Tensor
    tokens_BL: torch.Tensor

    @staticmethod
    def published(folder: Path, *, scale: int, every: int, tokens: int, length: int) -> Task:
        """The published expert config of the intent task, and the routing that DeepSeek-V2-Lite itself had there, in
        one of `every` MoE layers."""
        config = read_expert_config(folder / "intent_expert_config.json")
        taken = list(config.experts.values())[::every]
        with np.load(folder / "intent_routing.npz") as file:
            ids_LTK = torch.from_numpy(file["expert_ids"][::every, :tokens].astype(np.int64))
        generator = torch.Generator().manual_seed(0)
        tokens_BL = torch.randint(0, 102400 // scale, (tokens // length, length), generator=generator)
        experts = {str(1 + layer): ids for layer, ids in enumerate(taken)}
        return Task(scale, replace(config, experts=experts), ids_LTK, tokens_BL)

    def architecture(self) -> dict:
        """DeepSeek-V2-Lite's configuration, scaled. As there, a dense layer lies below the MoE layers. Heads are half
        as wide and so many fewer that the projections scale as everything else does."""
        return {
            "model_type": "deepseek_v2",
            "vocab_size": 102400 // self.scale,
            "hidden_size": 2048 // self.scale,
            "intermediate_size": 10944 // self.scale,
            "moe_intermediate_size": 1408 // self.scale,
            "num_hidden_layers": 1 + len(self.ids_LTK),
            "num_attention_heads": 32 // self.scale,
            "num_key_value_heads": 32 // self.scale,
            "kv_lora_rank": 512 // self.scale,
            "q_lora_rank": None,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 2,
            "num_experts_per_tok": TOP_K,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "max_position_embeddings": 4096,
        }


@dataclass(frozen=True)
class Arm:
    name: str
    engine: Engine
    task: Task

    def forward_backward(self) -> float:
        """One micro-batch -> its loss. The engine then waits for `step` or `forget`."""
        tokens_BL = self.task.tokens_BL
        logits_BLV = self.engine.forward(input_ids=tokens_BL, use_cache=False).logits
        loss = label_loss_sum(logits_BLV, tokens_BL) / count_labels(tokens_BL)
        self.engine.backward(loss)
        return loss.item()

    def step(self) -> None:
        result = self.engine.step(1e-5)
        assert not result.skipped

    def selected_gradients(self) -> dict[tuple[str, int], torch.Tensor]:
        """(tensor, expert) -> gradient of each selected expert, after a backward."""
        wanted = {f"model.layers.{layer}.mlp.experts": ids for layer, ids in self.task.chosen.experts.items()}
        found = {}
        for piece in self.engine.gradients():
            if piece.expert in wanted.get(piece.name.rpartition(".")[0], ()):
                found[piece.name, piece.expert] = piece.tensor
        return found

    def optimizer_bytes(self) -> int:
        """fp32 masters and moments: what the optimizer keeps beside the model's own parameters."""
        optimizer = self.engine._backend.optimizer
        own = {id(parameter) for parameter in self.engine.module.parameters()}
        masters = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
        moments = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
        return sum(tensor.nbytes for tensor in (*masters, *moments))

    def gradient_bytes(self) -> int:
        """Gradients that lie in memory between the last backward and the step."""
        optimizer = self.engine._backend.optimizer
        holders = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        holders |= {id(p): p for p in self.engine.module.parameters()}
        return sum(p.grad.nbytes for p in holders.values() if p.grad is not None)


def esft(task: Task, *, backend: str = "plain") -> Arm:
    """What the published expert config selects; everything else frozen."""
    return _arm("ESFT", task, {"include": ["*"], **_sections(task.chosen)}, backend=backend)


def full(task: Task) -> Arm:
    return _arm("full fine-tuning", task, {"include": ["*"]})


def masking(task: Task) -> Arm:
    """All experts of the stacked tensors get gradients, which are then multiplied by 0 or 1; what is no routed expert
    is frozen, as it costs nothing to freeze it. (Without weight decay, or that would move what the mask freezes.)"""
    arm = _arm("gradient masking", task, {"include": ["*.mlp.experts.*"]}, weight_decay=0.0)
    for (_, layer), ids in zip(moe_layers(arm.engine.module), task.chosen.experts.values(), strict=True):
        for parameter in layer.trainable.parameters():
            mask = torch.zeros(EXPERTS, *[1] * (parameter.dim() - 1), dtype=parameter.dtype)
            mask[ids] = 1
            parameter.register_hook(partial(torch.mul, mask))
    return arm


def lora(task: Task) -> Arm:
    """Low-rank updates of all routed experts, as PEFT makes them of stacked tensors (`target_parameters`): the weight
    is W + 2·B·A, formed in each forward; its gradient, formed in each backward, goes on to A and B."""
    return _arm(f"LoRA r={RANK} on the experts", task, {"include": ["*.mlp.experts.*"]}, change=_add_low_rank)


def _add_low_rank(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, layer in moe_layers(model):
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.trainable, name)
            parametrize.register_parametrization(layer.trainable, name, _LowRank(weight))


class _LowRank(nn.Module):
    def __init__(self, weight_SBA: torch.Tensor):
        super().__init__()
        seats, rows, columns = weight_SBA.shape
        self.a = nn.Parameter(torch.randn(seats, RANK, columns, dtype=weight_SBA.dtype) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(seats, rows, RANK, dtype=weight_SBA.dtype))

    def forward(self, weight_SBA: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(weight_SBA, self.b, self.a, alpha=2.0)


def _sections(chosen: ExpertConfig) -> dict:
    return {
        "experts": chosen.experts,
        "shared_experts": chosen.shared_experts,
        "non_expert_modules": chosen.non_expert_modules,
    }


def _arm(
    name: str,
    task: Task,
    trainable: dict,
    *,
    change: Callable[[nn.Module], None] = lambda model: None,
    weight_decay: float = 0.1,
    backend: str = "plain",
) -> Arm:
    # sdpa has no fast form for value heads narrower than key heads on a CPU, and then computes in fp32.
    model = {"config": task.architecture(), "dtype": "bfloat16", "tokenizer": "offline", "attention": "eager"}
    config = build({"model": model, "trainable": trainable, "data": {"train": {"corpus": "python_code"}}})
    grid = Grid.single()
    model = build_model(config, plan_model(config, grid), grid)
    for (_, layer), ids_TK in zip(moe_layers(model), task.ids_LTK, strict=True):
        layer.register_forward_pre_hook(partial(_send, ids_TK))
    change(model)
    engine = build_engine(
        model, grid, zero_stage=2, precision="bf16", clip_norm=1.0, weight_decay=weight_decay, backend=backend
    )
    return Arm(name, engine, task)


def _send(ids_TK: torch.Tensor, layer: nn.Module, arguments: tuple) -> tuple:
    hidden_TH, _, weights_TK = arguments
    return hidden_TH, ids_TK, weights_TK
