"""One MoE block, ours and other people's, with the same weights.

Each function takes a `Problem` and returns a `Contender`: a callable `[T,H] -> [T,H]` and where the gradients of an
expert's weights lie. Experts differ from each other and a rank builds only its own. Builders of peers import them:
where a package is missing or has changed, the builder raises and the benchmark leaves its row out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import contiguous
from moe_dist.parallel.grid import Grid


@dataclass(frozen=True)
class Shape:
    """tokens in all, experts, chosen per token, hidden, expert width."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    width: int

    def __str__(self) -> str:
        return f"T{self.tokens} E{self.experts} K{self.top_k} H{self.hidden} I{self.width}"


@dataclass(frozen=True)
class Contender:
    """`run(hidden_TH)` and `gradient(local expert) -> (gate_up [2I,H], down [H,I])`, None before a backward."""

    name: str
    run: Callable[[torch.Tensor], torch.Tensor]
    modules: nn.Module
    gradient: Callable[[int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Problem:
    """A shape in a dtype on one of `grid.expert` ranks, which share out tokens and experts evenly.

    The routing is the same for every contender, to the bit and in every dtype: a token's first E numbers are its
    logits, distinct multiples of 1/8, and the router's matrix is the identity on them. Each token thus draws its
    experts at random, and the loads are as uneven as chance makes them.
    """

    shape: Shape
    dtype: torch.dtype
    grid: Grid

    @property
    def mine(self) -> int:
        return self.shape.experts // self.grid.expert

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's tokens and the gradient of its output, `[T/P, H]`."""
        tokens = self.shape.tokens // self.grid.expert
        generator = torch.Generator().manual_seed(1 + self.grid.expert_rank)
        hidden, grad = torch.randn(2, tokens, self.shape.hidden, generator=generator).to(self.dtype)
        experts = self.shape.experts
        levels = torch.rand(tokens, experts, generator=generator).argsort(dim=1)
        hidden[:, :experts] = ((levels - experts // 2) / 8).to(self.dtype)
        return hidden.requires_grad_(), grad

    def router_weight(self) -> torch.Tensor:
        return torch.eye(self.shape.experts, self.shape.hidden, dtype=self.dtype)

    def fill(self, gate_up: Callable[[int], torch.Tensor], down: Callable[[int], torch.Tensor]) -> None:
        """Write the weights of this rank's experts into `gate_up(i)` [2I,H] and `down(i)` [H,I], i counted here."""
        generator = torch.Generator().manual_seed(0)
        inner, hidden = 2 * self.shape.width, self.shape.hidden
        base_in = torch.randn(inner, hidden, generator=generator) / hidden**0.5
        base_out = torch.randn(hidden, self.shape.width, generator=generator) / self.shape.width**0.5
        with torch.no_grad():
            for i in range(self.mine):
                expert = self.grid.expert_rank * self.mine + i
                gate_up(i).copy_(base_in.roll(5 * expert, dims=0) * (1 + expert / self.shape.experts))
                down(i).copy_(base_out.roll(3 * expert, dims=0) * (1 + expert / self.shape.experts))

    def config(self):
        """The transformers configuration of such a block (one layer, a token vocabulary)."""
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(
            num_experts=self.shape.experts,
            num_experts_per_tok=self.shape.top_k,
            hidden_size=self.shape.hidden,
            moe_intermediate_size=self.shape.width,
            norm_topk_prob=True,
            num_hidden_layers=1,
            vocab_size=8,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
        )

    def router(self) -> nn.Module:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

        router = Qwen3MoeTopKRouter(self.config())
        router.weight = nn.Parameter(self.router_weight())
        return router


def ours(problem: Problem) -> Contender:
    """Our experts behind transformers' own router, as load_model puts them there."""
    spec = ExpertSpec(problem.shape.experts, problem.shape.hidden, problem.shape.width)
    placement = contiguous(problem.shape.experts, ranks=problem.grid.expert)
    experts = MoEExperts(spec, placement, problem.grid, dtype=problem.dtype)
    span = experts.trainable
    problem.fill(lambda i: span.gate_up_proj[i], lambda i: span.down_proj[i])
    router = problem.router()

    def run(hidden_TH):
        _, weights_TK, ids_TK = router(hidden_TH)
        return experts(hidden_TH, ids_TK, weights_TK)

    return Contender(
        "moe_dist",
        run,
        nn.ModuleList([router, experts]),
        lambda i: (span.gate_up_proj.grad[i], span.down_proj.grad[i]),
    )


def share_weights(contender: Contender) -> dict[str, nn.Parameter]:
    """The stacked weights of our experts, for a peer in the same process that has the same layout."""
    span = contender.modules[1].trainable
    return {"gate_up_proj": span.gate_up_proj, "down_proj": span.down_proj}


def transformers_experts(problem: Problem, implementation: str, weights: dict[str, nn.Parameter]) -> Contender:
    """transformers' own block in one process; `weights` may be shared with ours."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = problem.config()
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    for name, weight in weights.items():
        experts.register_parameter(name, weight)
    router = problem.router()

    def run(hidden_TH):
        _, weights_TK, ids_TK = router(hidden_TH)
        return experts(hidden_TH, ids_TK, weights_TK)

    return Contender(
        f"transformers {implementation}",
        run,
        nn.ModuleList([router, experts]),
        lambda i: (experts.gate_up_proj.grad[i], experts.down_proj.grad[i]),
    )


def transformers_expert_parallel(problem: Problem) -> Contender:
    """transformers' own expert parallelism (all_to_all), applied to the block by the function that applies it to
    models; without the FSDP that a model would get around it."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = problem.config()
    config._experts_implementation = "grouped_mm"
    block = nn.Module()
    with torch.device("meta"):
        block.experts = Qwen3MoeExperts(config)
    block.router = problem.router()
    mesh = init_device_mesh("cpu", (problem.grid.expert, 1), mesh_dim_names=("ep", "tp"))
    plan = {
        "experts.gate_up_proj": "grouped_gemm",
        "experts.down_proj": "grouped_gemm",
        "experts": "ep_dispatch_experts",
    }
    apply_expert_parallelism(block, mesh["ep"], mesh["tp"], plan, "all_to_all")
    experts = block.experts.to_empty(device="cpu").to(problem.dtype)
    local = [experts.gate_up_proj.to_local(), experts.down_proj.to_local()]
    problem.fill(lambda i: local[0][i], lambda i: local[1][i])

    def run(hidden_TH):
        _, weights_TK, ids_TK = block.router(hidden_TH)
        return experts(hidden_TH, ids_TK, weights_TK)

    return Contender(
        "transformers EP all_to_all",
        run,
        block,
        lambda i: (experts.gate_up_proj.grad.to_local()[i], experts.down_proj.grad.to_local()[i]),
    )


def deepspeed_autoep(problem: Problem) -> Contender:
    """DeepSpeed AutoEP, which replaces the block of a transformers model by its own layer."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config
    from transformers import Qwen3MoeForCausalLM
    from transformers.utils import output_capturing

    # AutoEP asks this registry by name and with a default; the one of transformers 5.23 takes a model and nothing else.
    def get(self, key, default=None):
        return dict.get(self, key if isinstance(key, str) else str(type(key)), default)

    type(output_capturing._CAN_RECORD_REGISTRY).get = get

    size, rank = problem.grid.expert, problem.grid.expert_rank
    config = problem.config()
    model = Qwen3MoeForCausalLM(config).to(problem.dtype)
    _start_deepspeed()
    settings = {"enabled": True, "autoep_size": size, "preset_model": "qwen3_moe", "load_balance_coeff": None}
    autoep = AutoEP(model, parse_autoep_config(settings))
    (spec,) = autoep.ep_parser()
    autoep.replace_moe_layer(spec, size, rank)
    layer = model.model.layers[0].mlp
    layer.set_deepspeed_parallelism()
    experts, width = layer.experts, problem.shape.width
    with torch.no_grad():
        layer.router.gate.weight.copy_(problem.router_weight())

        def gate_up(i):
            return _Halves(experts.w1[i], experts.w3[i])

        problem.fill(gate_up, lambda i: experts.w2[i])
    assert experts.w1.shape[1] == width
    return Contender(
        "DeepSpeed AutoEP",
        lambda hidden_TH: _first(layer(hidden_TH[None]))[0],
        layer,
        lambda i: (torch.cat([experts.w1.grad[i], experts.w3.grad[i]]), experts.w2.grad[i]),
    )


class _Halves:
    """Two matrices that take the halves of one."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor):
        self.halves = first, second

    def copy_(self, whole: torch.Tensor) -> None:
        for half, part in zip(self.halves, whole.chunk(2), strict=True):
            half.copy_(part)


class _Mlp(nn.Module):
    """An expert as DeepSpeed's own MoE layer takes it: a module."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False, dtype=dtype)
        self.down = nn.Linear(width, hidden, bias=False, dtype=dtype)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def deepspeed_native(problem: Problem) -> Contender:
    """DeepSpeed's own MoE layer without dropping: each expert is padded to the rows of the fullest, and its gate
    works in fp32 and computes a balance loss on the way."""
    from deepspeed.moe.layer import MoE

    _start_deepspeed()
    shape = problem.shape
    with torch.device("meta"):
        expert = _Mlp(shape.hidden, shape.width, problem.dtype)
    layer = MoE(
        shape.hidden,
        expert,
        num_experts=shape.experts,
        ep_size=problem.grid.expert,
        k=shape.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()
    experts = layer.deepspeed_moe.experts.to_empty(device="cpu").deepspeed_experts
    problem.fill(lambda i: experts[i].gate_up.weight, lambda i: experts[i].down.weight)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(problem.router_weight())
    return Contender(
        "DeepSpeed MoE, no drops (pads experts to the fullest)",
        lambda hidden_TH: layer(hidden_TH)[0],
        layer,
        lambda i: (experts[i].gate_up.weight.grad, experts[i].down.weight.grad),
    )


def _start_deepspeed() -> None:
    """Let DeepSpeed use the process group that is there. Its shared-memory op would be compiled first, for half a
    minute, and serves none of the collectives here."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)


def _first(output):
    return output[0] if isinstance(output, tuple) else output
