"""A toy with an MLP that is cut by hand over the tensor axis, and layers on two pipeline stages, under an engine.

Activations go from stage to stage by plain sends, a micro-batch at a time, so that nothing but the engine is tried.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import contiguous
from moe_dist.parallel.grid import Grid, build_grid
from moe_dist.parallel.shard import Shard, cut_parameter
from moe_dist.parallel.tensor import gather_tokens, scatter_sum
from moe_dist.train.engine import Engine, build_engine
from tests.train import toy
from tests.train.runner import HYPER, RATES, packed, reader, state_of

WIDTH = 12
LENGTH = 6  # tokens of every rank


class Cut(nn.Module):
    """A column-parallel layer, tanh, a row-parallel one."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(toy.HIDDEN, WIDTH)
        self.down = nn.Linear(WIDTH, toy.HIDDEN)
        self.grid = Grid.single()

    def cut(self, grid: Grid) -> None:
        self.grid = grid
        if grid.tensor > 1:
            for module, name, dim in ((self.up, "weight", 0), (self.up, "bias", 0), (self.down, "weight", 1)):
                shard = Shard(dim, grid.tensor_rank, grid.tensor)
                setattr(module, name, cut_parameter(getattr(module, name), shard))

    def forward(self, x_SH):
        if self.grid.tensor == 1:
            return self.down(torch.tanh(self.up(x_SH)))
        inner_MW = torch.tanh(self.up(gather_tokens(x_SH, self.grid)))
        return scatter_sum(inner_MW @ self.down.weight.T, self.grid) + self.down.bias


class Layer(toy.Layer):
    def __init__(self, experts: nn.Module):
        super().__init__(experts, ())
        self.mlp = Cut()

    def forward(self, x_TH):
        return super().forward(x_TH + self.mlp(x_TH))


class Model(nn.Module):
    def __init__(self, experts: list[nn.Module], tied: bool):
        super().__init__()
        self.embed = nn.Embedding(toy.VOCAB, toy.HIDDEN)
        self.layers = nn.ModuleList(Layer(module) for module in experts)
        self.head = nn.Linear(toy.HIDDEN, toy.VOCAB)
        if tied:
            self.head.weight = self.embed.weight

    def named_non_persistent_buffers(self):  # as models of transformers have
        return iter(())

    def forward(self, x):
        x_TH = x if self.embed is None else self.embed(x)
        for layer in self.layers:
            x_TH = x_TH if layer is None else layer(x_TH)
        return x_TH if self.head is None else self.head(x_TH)


@dataclass(frozen=True)
class Case:
    p: int = 1
    t: int = 1
    e: int = 1
    stage: int = 1
    tied: bool = False
    precision: str = "fp32"
    frozen: tuple[str, ...] = ()  # prefixes of names
    experts: tuple = (tuple(range(toy.EXPERTS)),) * toy.LAYERS
    accumulation: int = 1


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = Model([toy.PlainExperts() for _ in range(toy.LAYERS)], tied=False)
    return {name: torch.randn(p.shape, generator=generator) * 0.4 for name, p in model.named_parameters()}


def build(case: Case, seed: int = 0) -> Engine:
    """Collective: this rank's share of the model under an engine."""
    grid = build_grid(expert=case.e, pipeline=case.p, tensor=case.t)
    experts = [MoEExperts(toy.SPEC, contiguous(toy.EXPERTS, ranks=case.e, trainable=ids), grid) for ids in case.experts]
    model = Model(experts, case.tied)
    toy.fill(model, experts, weights(seed), trains=lambda name: not (case.frozen and name.startswith(case.frozen)))
    for layer in model.layers:
        layer.mlp.cut(grid)
    if case.p > 1:
        if grid.is_last_stage and case.tied:
            model.tied_copies = {"head.weight": "embed.weight"}
        if not grid.is_first_stage:
            model.embed = None
        if not grid.is_last_stage:
            model.head = None
        per_stage = toy.LAYERS // case.p
        for index in range(toy.LAYERS):
            if index // per_stage != grid.pipeline_rank:
                model.layers[index] = None
    return build_engine(
        model,
        grid,
        zero_stage=case.stage,
        precision=case.precision,
        clip_norm=0.5,
        accumulation_steps=case.accumulation,
        reduce_bucket_size=300,
        **HYPER,
    )


def batches(steps: int, micro_batches: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """[step][micro-batch] -> (ids_T, labels_T). With this seed a plain process in float32 is within 1.3e-6 of itself in
    float64 after three steps; with others AdamW magnifies rounding where a gradient is as small as its eps."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for step in range(steps):
        row = []
        for index in range(micro_batches):
            ids_T, labels_T = torch.randint(toy.VOCAB, (2, LENGTH), generator=generator)
            labels_T = labels_T.clone()
            labels_T[: (index + step) % 4] = -100
            row.append((ids_T, labels_T))
        made.append(row)
    return made


def accumulate(engine: Engine, row) -> None:
    """This rank's micro-batches of one step, through all stages."""
    grid, labels = engine.grid, toy.label_count(row)
    before, after = grid.rank - grid.stage_size, grid.rank + grid.stage_size
    first = grid.stage_rank * engine.accumulation_steps
    for ids_T, labels_T in row[first : first + engine.accumulation_steps]:
        x = ids_T
        if not grid.is_first_stage:
            x = torch.empty(LENGTH, toy.HIDDEN)
            dist.recv(x, before)
            x.requires_grad_()
        y = engine.forward(x=x if grid.is_first_stage else x.to(next(engine.module.parameters()).dtype))
        if grid.is_last_stage:
            engine.backward(toy.loss_sum(y, labels_T) / labels)
        else:
            dist.send(y.detach().float(), after)
            grad = torch.empty(LENGTH, toy.HIDDEN)
            dist.recv(grad, after)
            # What comes back has the factor of the next stage's engine already, and this one's is as large.
            engine.backward((y * grad).sum() / grid.stage_size)
        if not grid.is_first_stage:
            dist.send(torch.zeros(LENGTH, toy.HIDDEN) if x.grad is None else x.grad, before)


def train(case: Case, steps: int = 3, load: tuple | None = None) -> dict:
    """On each rank: gradients of the first step, norms, and the state after the last. load: (tensors, Adam steps)."""
    engine = build(case, seed=0 if load is None else 5)
    if load is not None:
        engine.load_fragments(reader(load[0]), adam_step=load[1])
    norms, gradients = [], []
    for row, rate in zip(batches(steps, engine.grid.stage_size * case.accumulation), RATES, strict=False):
        accumulate(engine, row)
        gradients = gradients or packed(engine.gradients())
        norms.append(engine.step(rate).grad_norm)
    state = state_of(engine)
    engine.close()
    return {**state, "norms": norms, "gradients": gradients}


def train_plain(case: Case, micro_batches: int, steps: int = 3) -> dict:
    """The same by one plain process: kind -> {(name, expert): flat tensor}."""
    model = Model([toy.PlainExperts() for _ in range(toy.LAYERS)], case.tied)
    whole = weights()
    model.load_state_dict(whole | {"head.weight": whole["embed.weight" if case.tied else "head.weight"]})
    leaves, parts = {}, {}
    for name, parameter in model.named_parameters():
        stacked = ".experts." in name
        for expert in case.experts[int(name.split(".")[1])] if stacked else (-1,):
            if stacked or not case.frozen or not name.startswith(case.frozen):
                parts[name, expert] = (parameter, expert if stacked else slice(None))
                leaves[name, expert] = parameter.detach()[parts[name, expert][1]].clone().requires_grad_()
    groups = [
        {"params": [leaf], "weight_decay": HYPER["weight_decay"] if leaf.dim() >= 2 else 0.0}
        for leaf in leaves.values()
    ]
    optimizer = torch.optim.AdamW(groups, betas=HYPER["betas"], eps=HYPER["eps"])
    norms, gradients = [], {}
    for row, rate in zip(batches(steps, micro_batches), RATES, strict=False):
        model.zero_grad()
        for ids_T, labels_T in row:
            (toy.loss_sum(model(ids_T), labels_T) / toy.label_count(row)).backward()
        for key, leaf in leaves.items():
            parameter, where = parts[key]
            leaf.grad = parameter.grad[where].clone()
        gradients = gradients or {key: leaf.grad.flatten().clone() for key, leaf in leaves.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(leaves.values(), 0.5).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for key, leaf in leaves.items():
                parts[key][0][parts[key][1]] = leaf
    kinds = {kind: {key: optimizer.state[leaf][kind].flatten() for key, leaf in leaves.items()} for kind in
             ("exp_avg", "exp_avg_sq")}  # fmt: skip
    return {"norms": norms, "gradients": gradients, **kinds} | {
        "weights": {key: leaf.detach().flatten() for key, leaf in leaves.items()}
    }
