"""A selection with all that has to be known about it: the expert config, how it was made, and what it covers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_dist.config.expert_files import KINDS, ExpertConfig
from moe_dist.errors import UserError
from moe_dist.methods.esft.select import least_used_experts, random_experts, ranked, select_experts

DEFAULT_P = {"token": 0.2, "gate": 0.1}  # the paper's
CONTROLS = ("none", "random", "least_used")

Scores = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Choice:
    """`config`: what trains. `record`: how it was chosen, and per layer what it covers, as plain JSON values."""

    config: ExpertConfig
    record: dict[str, Any]


def choose(
    scores: Scores,
    *,
    kind: str = "token",
    p: float | None = None,
    p_mode: str = "absolute",
    control: str = "none",
    seed: int = 0,
    shared_experts: bool = False,
    non_expert_modules: bool = False,
) -> Choice:
    """Select experts by `scores` {layer index: [score of each expert]}, or a control of the same size.

    kind: what the scores are, "token" or "gate"; it decides the default of p (0.2 and 0.1). control: "none",
    "random" (drawn from the other experts by `seed`), or "least_used". Raises UserError where nothing would be
    selected, and as `select_experts` does.
    """
    for name, value, allowed in (("kind", kind, KINDS), ("control", control, CONTROLS)):
        if value not in allowed:
            raise UserError(f"{name}={value!r}: has to be one of {', '.join(allowed)}")
    p = DEFAULT_P[kind] if p is None else p
    if not p > 0:
        raise UserError(f"p={p}: has to be above 0, or no expert would train")
    chosen = select_experts(scores, p, p_mode=p_mode)
    if not any(chosen.values()):
        raise UserError("every score is zero: no expert was used")
    if control == "random":
        chosen = random_experts(chosen, {layer: len(values) for layer, values in scores.items()}, seed=seed)
    elif control == "least_used":
        chosen = least_used_experts(chosen, scores)
    record = {
        "kind": kind,
        "p": p,
        "p_mode": p_mode,
        "control": control,
        "seed": seed if control == "random" else None,
        "layers": {
            layer: {
                "selected": len(ids),
                "experts": len(scores[layer]),
                "covered": round(math.fsum(scores[layer][expert] for expert in ids), 6),
                "mass": round(math.fsum(scores[layer]), 6),
            }
            for layer, ids in chosen.items()
        },
    }
    return Choice(ExpertConfig(chosen, shared_experts, non_expert_modules), record)


def render(choice: Choice) -> str:
    """The selection as a table: a line for each layer, and one for all."""
    lines = [f"{'layer':>5} {'selected':>9} {'covered':>8} {'of mass':>8}  experts"]
    for layer, figures in choice.record["layers"].items():
        share = figures["covered"] / figures["mass"] if figures["mass"] else 0.0
        ids = " ".join(map(str, choice.config.experts[layer]))
        count = f"{figures['selected']}/{figures['experts']}"
        lines.append(f"{layer:>5} {count:>9} {figures['covered']:>8.4f} {share:>8.1%}  {ids}")
    selected, experts = (sum(f[key] for f in choice.record["layers"].values()) for key in ("selected", "experts"))
    lines.append(f"  all {f'{selected}/{experts}':>9}  ({selected / experts:.1%} of the experts)")
    return "\n".join(lines)


def coverage_curve(score: Sequence[float]) -> list[float]:
    """Share of the layer's mass that its 0, 1, 2, ... highest experts cover; `[E+1]` values from 0 to 1."""
    mass, covered = math.fsum(score), [0.0]
    for expert in ranked(dict(enumerate(score))):
        covered.append(covered[-1] + (score[expert] / mass if mass else 0.0))
    return covered


def overlap(ours: Scores, theirs: Scores, *, top: int) -> float:
    """How many of the `top` highest experts of a layer two tasks share, as a mean over layers (from 0 to `top`).

    Raises UserError unless both are scores of the same layers with the same number of experts.
    """
    if {layer: len(score) for layer, score in ours.items()} != {layer: len(score) for layer, score in theirs.items()}:
        raise UserError("the scores compared are not of the same model: layers or numbers of experts differ")
    best = [{layer: set(ranked(dict(enumerate(s)))[:top]) for layer, s in task.items()} for task in (ours, theirs)]
    return sum(len(best[0][layer] & best[1][layer]) for layer in ours) / len(ours)
