"""Trains the toy model on the ranks of a pool, and on one plain process, and gives back all there is to compare."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
import torch

from moe_dist.checkpoint import Range
from moe_dist.models.recompute import enable_recompute
from moe_dist.parallel.grid import build_grid
from moe_dist.train.engine import Engine, build_engine
from tests.reference import relative_error
from tests.train import toy

EVERY = [list(range(toy.EXPERTS))] * toy.LAYERS
HYPER = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
RATES = (1e-2, 2e-2, 5e-3)


@dataclass(frozen=True)
class Case:
    ep: int = 1
    stage: int = 1
    precision: str = "fp32"
    trainable: list = field(default_factory=lambda: EVERY)
    dense_trains: bool = True
    shunned: tuple = ()
    tied: bool = False
    empty: tuple = ()
    recompute: bool = False
    evaluate: bool = False
    accumulation: int = 1
    clip_norm: float | None = 0.5
    bucket: int = 300
    backend: str = "deepspeed"


def build(case: Case, weights=None) -> Engine:
    """Collective: the toy model under an engine."""
    gc.freeze()  # ZeRO 3 collects garbage at its start; without the imported modules that is quick
    grid = build_grid(expert=case.ep)
    weights = toy.full_weights() if weights is None else weights
    model = toy.parallel_model(
        weights, grid, case.trainable, dense_trains=case.dense_trains, shunned=case.shunned, tied=case.tied
    )
    if case.recompute:
        enable_recompute(model)
    return build_engine(
        model,
        grid,
        zero_stage=case.stage,
        precision=case.precision,
        clip_norm=case.clip_norm,
        accumulation_steps=case.accumulation,
        reduce_bucket_size=case.bucket,
        backend=case.backend,
        **HYPER,
    )


def accumulate(engine: Engine, row, fault: str | None = None) -> None:
    """This rank's micro-batches of one step: row[rank·accumulation + m]. A fault is in the first of them."""
    labels = toy.label_count(row)
    first = engine.grid.rank * engine.accumulation_steps
    for ids_T, labels_T in row[first : first + engine.accumulation_steps]:
        logits_TV = engine.forward(ids_T=ids_T)
        loss = toy.loss_sum(logits_TV, labels_T) / labels
        engine.backward(FAULTS[fault](loss, logits_TV) if fault else loss)
        fault = None


FAULTS = {
    "loss is nan": lambda loss, logits_TV: loss * float("nan"),
    # The constant has no gradient: only the loss tells.
    "loss alone is inf": lambda loss, logits_TV: loss + float("inf"),
    # The root's slope at zero is infinite, times zero is nan: only the gradient tells.
    "gradient alone is nan": lambda loss, logits_TV: loss + (logits_TV.sum() * 0).abs().sqrt(),
}


@torch.no_grad()
def evaluate(engine: Engine, row) -> None:
    """A forward pass that must not disturb training."""
    engine.module.eval()
    engine.forward(ids_T=row[engine.grid.rank][0])
    engine.module.train()


def packed(fragments) -> list[tuple]:
    """Fragments as plain data, copied: the engine goes on writing into what they view."""
    return [(f.name, f.expert, (f.offset, f.runs, f.stride), f.tensor.detach().clone().numpy()) for f in fragments]


def assembled(ranks: list[list[tuple]]) -> dict[tuple[str, int], torch.Tensor]:
    """(name, expert) -> flat tensor, from the packed fragments of all ranks; no element may come twice."""
    pieces: dict[tuple[str, int], list] = {}
    for name, expert, (offset, runs, stride), array in (fragment for rank in ranks for fragment in rank):
        at = Range(name, expert, offset, array.size // runs, runs, stride)
        pieces.setdefault((name, expert), []).append((at, torch.from_numpy(array)))
    tensors = {}
    for key, found in pieces.items():
        size = max(at.end for at, _ in found)
        assert sum(at.numel for at, _ in found) == size, f"{key}: holes, or elements twice"
        tensor = torch.full((size,), torch.nan)
        for at, values in found:
            at.of(tensor).copy_(values.view(at.runs, at.length))
        assert not tensor.isnan().any(), f"{key}: a hole"
        tensors[key] = tensor
    return tensors


def train(case: Case, steps: int = 3) -> dict:
    """On each rank: losses and norms of all steps, gradients of the first, masters and moments after the last."""
    engine = build(case)
    rows = toy.batches(steps, engine.grid.world * case.accumulation, empty=case.empty)
    norms, gradients = [], None
    for row, rate in zip(rows, RATES, strict=False):
        accumulate(engine, row)
        if case.evaluate:
            evaluate(engine, row)
        if gradients is None:
            gradients = packed(engine.gradients())
        norms.append(engine.step(rate).grad_norm)
    weights, m, v = (packed(engine.fragments(kind)) for kind in ("weights", "exp_avg", "exp_avg_sq"))
    parameters = {name: tensor.float().numpy().copy() for name, tensor in engine.full_parameters()}
    engine.close()
    return {
        "norms": norms, "gradients": gradients, "weights": weights, "exp_avg": m, "exp_avg_sq": v,
        "parameters": parameters, "adam_step": engine.adam_step,
    }  # fmt: skip


def train_plain(case: Case, micro_batches: int, steps: int = 3) -> dict:
    """The same training by one plain torch process: (name, expert) -> flat tensor for each of the kinds."""
    model = toy.plain_model(toy.full_weights(), shunned=case.shunned, tied=case.tied)
    kept = {}
    for name, parameter in model.named_parameters():
        for expert in range(toy.EXPERTS) if ".experts." in name else (-1,):
            layer = int(name.split(".")[1]) if expert >= 0 else -1
            if expert in case.trainable[layer] if expert >= 0 else case.dense_trains:
                kept[name, expert] = parameter
    parts = {key: parameter[key[1]] if key[1] >= 0 else parameter for key, parameter in kept.items()}
    # One leaf tensor for each expert, so that AdamW leaves the frozen ones alone.
    leaves = {key: part.detach().clone().requires_grad_() for key, part in parts.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [leaf], "weight_decay": HYPER["weight_decay"] if leaf.dim() >= 2 else 0.0}
            for leaf in leaves.values()
        ],
        betas=HYPER["betas"],
        eps=HYPER["eps"],
    )
    norms, gradients = [], None
    for row, rate in zip(toy.batches(steps, micro_batches, empty=case.empty), RATES, strict=False):
        model.zero_grad()
        for ids_T, labels_T in row:
            (toy.loss_sum(model(ids_T=ids_T), labels_T) / toy.label_count(row)).backward()
        for (name, expert), leaf in leaves.items():
            gradient = kept[name, expert].grad
            leaf.grad = (gradient[expert] if expert >= 0 else gradient).clone()
        if gradients is None:
            gradients = {key: leaf.grad.flatten().clone() for key, leaf in leaves.items()}
        limit = float("inf") if case.clip_norm is None else case.clip_norm
        norms.append(torch.nn.utils.clip_grad_norm_(leaves.values(), limit).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for (name, expert), leaf in leaves.items():
                (kept[name, expert][expert] if expert >= 0 else kept[name, expert]).copy_(leaf)
    return {
        "norms": norms,
        "gradients": gradients,
        "weights": {key: leaf.detach().flatten() for key, leaf in leaves.items()},
        "exp_avg": {key: optimizer.state[leaf]["exp_avg"].flatten() for key, leaf in leaves.items()},
        "exp_avg_sq": {key: optimizer.state[leaf]["exp_avg_sq"].flatten() for key, leaf in leaves.items()},
    }


def reader(tensors: dict[str, dict[tuple[str, int], torch.Tensor]]):
    """What `Engine.load_fragments` wants, over whole tensors of each kind."""

    def read(kind, places):
        for place in places:
            where = place.range
            yield where.of(tensors[kind][where.name, where.expert]).flatten()

    return read


def state_of(engine: Engine) -> dict:
    """All that a checkpoint holds of this rank, and the parameters as the model sees them."""
    kinds = {kind: packed(engine.fragments(kind)) for kind in ("weights", "exp_avg", "exp_avg_sq")}
    parameters = {name: tensor.float().numpy().copy() for name, tensor in engine.full_parameters()}
    return {**kinds, "adam_step": engine.adam_step, "parameters": parameters}


def load_and_return(case: Case, tensors: dict, adam_step: int) -> dict:
    """A fresh engine, filled from outside; its state again."""
    engine = build(case, toy.full_weights(seed=5))
    engine.load_fragments(reader(tensors), adam_step=adam_step)
    state = state_of(engine)
    engine.close()
    return state


def steps_with(case: Case, faults: dict[int, str], skip: Iterable[int] = ()) -> dict:
    """Three steps; `faults[s]` spoils step s on one rank, steps in `skip` do not happen. The state after each."""
    engine = build(case)
    rows = toy.batches(3, engine.grid.world * case.accumulation)
    states, skipped, norms = [], [], []
    for step, row in enumerate(rows):
        if step in skip:
            continue
        fault = faults.get(step) if engine.grid.rank == engine.grid.world - 1 else None
        accumulate(engine, row, fault)
        result = engine.step(RATES[step])
        skipped.append(result.skipped)
        norms.append(result.grad_norm)
        states.append(state_of(engine))
    counted = engine.steps, engine.skipped_steps
    engine.close()
    return {"states": states, "skipped": skipped, "norms": norms, "counted": counted}


def resumed(case: Case) -> tuple[dict, dict]:
    """The state after three steps in one go, and after one, a move into a fresh engine, and two more."""
    rows = toy.batches(3, build_grid(expert=case.ep).world * case.accumulation)
    whole = build(case)
    for row, rate in zip(rows, RATES, strict=True):
        accumulate(whole, row)
        whole.step(rate)
    expected = state_of(whole)
    whole.close()

    engine = build(case)
    accumulate(engine, rows[0])
    engine.step(RATES[0])
    kept = {kind: list(engine.fragments(kind)) for kind in ("weights", "exp_avg", "exp_avg_sq")}
    fresh = build(case)
    own = {(kind, f.name, f.expert, f.offset): f.tensor for kind in kept for f in kept[kind]}

    def read(kind, places):
        # Same layout, and stages 1 to 3 hold what they own: the ranges come back as they were cut.
        return (own[kind, place.range.name, place.range.expert, place.range.offset] for place in places)

    fresh.load_fragments(read, adam_step=engine.adam_step)
    engine.close()
    for row, rate in zip(rows[1:], RATES[1:], strict=True):
        accumulate(fresh, row)
        fresh.step(rate)
    found = state_of(fresh)
    fresh.close()
    return expected, found


def partitions(case: Case) -> dict[str, tuple[int, int]]:
    """ZeRO 3: name -> (elements of the whole parameter, elements that this rank keeps of it)."""
    engine = build(case)
    sizes = {
        name: (parameter.ds_numel, parameter.ds_tensor.numel()) for name, parameter in engine.module.named_parameters()
    }
    engine.close()
    return sizes


def compare(results: list[dict], expected: dict) -> None:
    """What `train` gave on all ranks against the plain process: gradients, weights and moments by tensor and expert."""
    for kind, tolerance in (("gradients", 2e-6), ("weights", 1e-5), ("exp_avg", 5e-6), ("exp_avg_sq", 5e-6)):
        found = assembled([result[kind] for result in results])
        assert found.keys() == expected[kind].keys()
        errors = {key: relative_error(found[key], expected[kind][key]) for key in found}
        worst = max(errors, key=errors.get)
        assert errors[worst] <= tolerance, f"{kind} of {worst}: {errors[worst]:.1e}"
    for result in results:
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-6)
        assert result["adam_step"] == 3
