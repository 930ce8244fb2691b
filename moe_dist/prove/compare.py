"""Comparing what the ranks hold with what the plain process has left: gradients, weights, what is frozen, a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from safetensors import safe_open

from moe_dist.checkpoint.fragments import NOT_EXPERT, Fragment
from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.prove import plain
from moe_dist.prove.certificate import Check
from moe_dist.prove.errors import Tallies, everyone, sum_of_indices, worst_of_ranks
from moe_dist.prove.plain import label
from moe_dist.prove.problem import Problem
from moe_dist.train.engine import Engine
from moe_dist.train.pieces import KINDS
from moe_dist.train.start import on_rank_zero
from moe_dist.train.state import stored_buffers

OUTPUTS, GRADIENTS, NORMS, WEIGHTS = 2e-6, 2e-6, 2e-6, 1e-5  # relative errors, as those of tests/parity
BITS = 0.0


def by_step(found: list[float], expected: list[float]) -> dict[str, float]:
    """Relative errors of figures of each step."""
    pairs = zip(found, expected, strict=True)
    return {f"step {step + 1}": abs(one - other) / abs(other) for step, (one, other) in enumerate(pairs)}


def fragments(
    name: str,
    found: Iterable[Fragment],
    problem: Problem,
    grid: Grid,
    *,
    file: str,
    tolerance: float,
    rounding: Callable[[], dict[str, float]] | None = None,
) -> Check:
    """Fragments of all ranks against whole tensors in a file of the plain process. Collective.

    rounding: called on rank 0 where some error is beyond the tolerance; name -> the plain process' own error.
    """
    tallies, strange = Tallies(), set()
    with safe_open(problem.work / file, framework="pt") as reference:
        sizes = {key: reference.get_slice(key).get_shape()[0] for key in reference.keys()}  # noqa: SIM118 - no mapping
        read, whole = None, None
        for fragment in found:
            key = label((fragment.name, fragment.expert))
            if key not in sizes:
                strange.add(key)
                continue
            if key != read:
                read, whole = key, reference.get_tensor(key)
            tallies.add(key, fragment.tensor, fragment.range.of(whole), indices=sum_of_indices(fragment.range))
        merged = tallies.over_ranks(grid)
        unseen = [key for key in sizes if key not in merged and reference.get_tensor(key).any()]
    faults = [
        f"{problem.original(key)}: trains here, and should not" for key in sorted(set().union(*everyone(strange, grid)))
    ]
    faults += [f"{problem.original(key)}: no rank has it" for key in unseen]
    faults += [
        f"{problem.original(key)}: not every element comes once"
        for key, tally in merged.items()
        if not tally.covers(sizes[key])
    ]
    errors = {problem.original(key): tally.error for key, tally in merged.items()}
    check = Check.of(name, errors, tolerance, tuple(faults))
    if check.holds or faults or rounding is None:
        return check
    floors = {problem.original(key): floor for key, floor in on_rank_zero(rounding).items()}
    return Check.of(name, errors, tolerance, rounding=floors)


def frozen(engine: Engine, buffers: dict[str, list], problem: Problem, grid: Grid) -> Check:
    """What does not train is still what the folder holds, to the bit, and buffers are those of the plain process
    (the expert bias moves, by steps that all ranks take alike). Collective."""
    errors: dict[str, float] = {}
    with safe_open(problem.work / plain.FROZEN, framework="pt") as reference:
        known = set(reference.keys())
        seats = {
            parameter: (f"{path}.{name}", ids)
            for path, layer in moe_layers(engine.module)
            for name, parameter, ids in layer.expert_parameters()
        }
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                continue
            name, ids = seats.get(parameter, (name, (NOT_EXPERT,)))
            with engine.gathered([parameter]):
                for seat, expert in enumerate(ids):
                    if expert is None:
                        continue
                    key = label((name, expert))
                    held = parameter.detach() if expert == NOT_EXPERT else parameter.detach()[seat]
                    errors[key] = _bits(held, reference.get_tensor(key), parameter) if key in known else float("inf")
    for name, buffer in stored_buffers(engine.module):
        expected = torch.tensor(buffers[name], dtype=buffer.dtype)
        errors[name] = _bits(buffer, expected, buffer)
    merged = worst_of_ranks(errors, grid)
    unseen = [f"{problem.original(key)}: no rank has it frozen" for key in sorted(known - merged.keys())]
    return Check.of("frozen", {problem.original(key): error for key, error in merged.items()}, BITS, tuple(unseen))


def _bits(found: torch.Tensor, expected: torch.Tensor, parameter: torch.Tensor) -> float:
    """0 where the tensors are the same to the bit, else their largest difference (or infinity)."""
    shard = getattr(parameter, "shard", None)
    expected = expected if shard is None else shard.cut(expected)
    found = found.cpu()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if torch.equal(found, expected):
        return 0.0
    return (found.double() - expected.double()).abs().max().item() or float("inf")


def kept_state(engine: Engine) -> dict[tuple[str, str, int], torch.Tensor]:
    """Copies of the masters and moments that this rank owns, by kind, tensor and offset."""
    return {key: tensor.detach().clone() for key, tensor in _state(engine)}


def resumed(engine: Engine, kept: dict[tuple[str, str, int], torch.Tensor], problem: Problem, grid: Grid) -> Check:
    """Masters and moments after a resumed step against those of the uninterrupted run, to the bit. Collective."""
    errors: dict[str, float] = {}
    found = dict(_state(engine))
    for key in found.keys() | kept.keys():
        kind, name, _ = key
        error = float("inf") if key not in found or key not in kept else _bits(found[key], kept[key].cpu(), found[key])
        errors[f"{kind} of {problem.original(name)}"] = max(error, errors.get(f"{kind} of {problem.original(name)}", 0))
    return Check.of("resume", worst_of_ranks(errors, grid), BITS)


def _state(engine: Engine):
    for kind in KINDS:
        for fragment in engine.fragments(kind):
            yield (kind, label((fragment.name, fragment.expert)), fragment.offset), fragment.tensor
