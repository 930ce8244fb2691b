"""Training steps whose memory and bytes are measured, to hold a plan against: real engines on gloo ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.config.checks import axes_of
from moe_dist.config.load import build
from moe_dist.config.schema import RunConfig
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid, build_grid
from moe_dist.parallel.traffic import count_traffic
from moe_dist.planner.live import LiveBytes
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.engine import build_engine
from moe_dist.train.passes import run_passes
from moe_dist.train.routing import Routing

STEPS = 3  # the optimizer's state is there after the first, ZeRO 3 knows the order of the modules after the second
LEAST = 128  # bytes: what is smaller are flags and norms

MODELS = {
    "mixtral": {
        "model_type": "mixtral",
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "max_position_embeddings": 512,
    },
}


def config(
    world: int,
    *,
    family: str = "mixtral",
    precision: str = "bf16",
    recompute: bool = False,
    micro_batches: int = 2,
    length: int = 256,
    layers: int = 4,
    dispatcher: str = "auto",
    **parallel,
) -> RunConfig:
    """A run of `world` ranks on a model of some megabytes; `parallel`: keys of that section."""
    axes = 1
    for name in ("pipeline", "sequence", "tensor"):
        axes *= parallel.get(name, 1)
    return build(
        {
            "run": {"dir": "unused"},
            "model": {"config": MODELS[family] | {"num_hidden_layers": layers}},
            "data": {"train": ["unused.jsonl"], "seq_len": length},
            "moe": {"dispatcher": dispatcher},
            "parallel": {"reduce_bucket_size": 200_000, "world_size": world, **parallel},
            "train": {
                "precision": precision,
                "recompute": recompute,
                "micro_batch_size": 2,
                "global_batch_size": 2 * micro_batches * world // axes,
            },
        }
    )


def measure(settings: RunConfig, micro_batches: int, *, steps: int = STEPS) -> dict:
    """Train `steps` steps as the loop does. Of the last one, on this rank: the most bytes of live tensors, where they
    were before it, what was sent by what is counted (`parallel.traffic`), and the payloads of all collectives by kind.
    Of each experts layer the experts of its tokens, in order of the micro-batches. Collective.
    """
    with LiveBytes("cpu") as live:
        grid = build_grid(**axes_of(settings))
        model = build_model(settings, plan_model(settings, grid), grid)
        engine = build_engine(
            model,
            grid,
            zero_stage=settings.parallel.zero_stage,
            precision=settings.train.precision,
            clip_norm=1.0,
            accumulation_steps=micro_batches,
            reduce_bucket_size=settings.parallel.reduce_bucket_size,
        )
        routing = Routing(model, settings.moe, grid)
        chosen: dict[str, list] = {name: [] for name, _ in moe_layers(model)}
        for step in range(steps):
            batches = [_batch(settings, grid, step * micro_batches + number) for number in range(micro_batches)]
            routing.start_step()
            live.restart()
            start = live.now
            if step == steps - 1:
                for name, layer in moe_layers(model):
                    layer.recorders.append(lambda ids, _, kept=chosen[name]: kept.append(ids.numpy()))
            with count_traffic() as traffic, Collectives() as collectives:
                run_passes(engine, routing, batches, labels=1000, grid=grid)
                engine.step(1e-4)
        engine.close()
    sent = Counter()
    for exchange in traffic.exchanges:
        sent[exchange.what] += exchange.bytes
    return {
        "peak": live.peak,
        "resident": start,
        "sent": dict(sent),
        "collectives": collectives.payload,
        "chosen": chosen,
    }


def _batch(settings: RunConfig, grid: Grid, number: int) -> dict[str, torch.Tensor]:
    """Rows of two documents each, the same on all ranks that share them."""
    rows, length = settings.train.micro_batch_size, settings.data.seq_len
    generator = torch.Generator().manual_seed(1000 * number + grid.data_rank)
    ids = torch.randint(3, 1000, (rows, length), generator=generator)
    first = length // 3
    places = torch.cat([torch.arange(first), torch.arange(length - first)])
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "attention_mask": torch.ones_like(ids),
        "position_ids": places.expand(rows, length).clone(),
    }


# Operators of torch.distributed: what they are called here, and which argument is the payload.
KINDS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
}


class Collectives(TorchDispatchMode):
    """Payloads in bytes by (kind, size of the group), whoever calls: what all have in the end or give at the start."""

    def __init__(self):
        super().__init__()
        self.payload: dict[tuple[str, int], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            kind, place = KINDS.get(func._schema.name.split("::")[1], (None, 0))
            if kind is not None:
                size = sum(tensor.nbytes for tensor in _tensors(args[place]))
                group = next(dist.ProcessGroup.unbox(arg) for arg in args if _is_group(arg))
                if size >= LEAST:
                    key = kind, group.size()
                    self.payload[key] = self.payload.get(key, 0) + size
        return func(*args, **(kwargs or {}))


def _is_group(value) -> bool:
    return isinstance(value, torch.ScriptObject)


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
