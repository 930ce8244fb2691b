"""Which experts train: the smallest set that covers a share p of a task's routing, and controls to compare with.

Source: Wang et al., "Let the Expert Stick to His Last" (ESFT), section 3.3, equation 8.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from moe_dist.errors import UserError

Layer = TypeVar("Layer", bound=Hashable)
P_MODES = ("absolute", "fraction_of_mass")

# How far below p a sum still counts as reaching it, as a share of the layer's sum. Doubles added up over hundreds of
# experts are off by less than this, while sums of scores that are rounded to four decimals, as the published ones are,
# lie 1e-4 apart. Without it, whether 0.1 + 0.1 + 0.1 reaches 0.3 would depend on how a machine rounds.
_SLACK = 1e-12


def select_experts(
    scores: Mapping[Layer, Sequence[float] | Mapping], p: float = 0.2, *, p_mode: str = "absolute"
) -> dict[Layer, list[int]]:
    """The experts of each layer that train: highest scores first, until their sum reaches p.

    scores: of each layer, the score of every expert: a sequence, a tensor `[E]`, or {expert id: score}.
    p: what the scores of the selected experts must add up to. p_mode: "absolute" compares with p itself;
    "fraction_of_mass" with p times the layer's sum of scores, so that p means the same in models whose gate scores
    add up to one (normalised top-k weights) and in those where they do not (0.3 to 0.5 in DeepSeek-V2-Lite).

    Returns the ids by layer, under the same keys in the same order. Of equal scores the lower id comes first. An
    expert with score zero is never selected: where p is more than the sum, all others are. The published selections
    come out of scores rounded to four decimals; nothing is rounded here.
    Raises UserError for scores that are no numbers of at least zero, for p below zero or not finite, and for a
    fraction above one.
    """
    if p_mode not in P_MODES:
        raise UserError(f"p_mode={p_mode!r}: has to be one of {', '.join(P_MODES)}")
    if not (math.isfinite(p) and p >= 0):
        raise UserError(f"p={p}: has to be a number of at least 0")
    if p_mode == "fraction_of_mass" and p > 1:
        raise UserError(f"p={p}: a fraction of the mass is at most 1")
    selected = {}
    for layer, values in scores.items():
        score = as_scores(values, layer)
        mass = math.fsum(score.values())
        target = (p * mass if p_mode == "fraction_of_mass" else p) - _SLACK * mass
        chosen, total = [], 0.0
        for expert in ranked(score):
            if total >= target or not score[expert]:
                break
            chosen.append(expert)
            total += score[expert]
        selected[layer] = chosen
    return selected


def random_experts(
    selected: Mapping[Layer, Sequence[int]], num_experts: Mapping[Layer, int], *, seed: int
) -> dict[Layer, list[int]]:
    """A control: of each layer as many experts as are selected, drawn at random from the others.

    Where fewer others are left than are needed, all of them are taken, and the rest is drawn from the selected ones.
    The draw is a function of seed and layer alone. num_experts: how many experts each layer has.
    """
    drawn = {}
    for layer, ids in selected.items():
        # Python keeps the sequence of random() for a seed the same in all versions, unlike what sample() makes of it.
        chance = random.Random(f"{seed}/{layer}")
        place = [chance.random() for _ in range(num_experts[layer])]
        taken = set(ids)
        order = sorted(range(num_experts[layer]), key=lambda expert: (expert in taken, place[expert]))
        drawn[layer] = order[: len(ids)]
    return drawn


def least_used_experts(
    selected: Mapping[Layer, Sequence[int]], scores: Mapping[Layer, Sequence[float] | Mapping]
) -> dict[Layer, list[int]]:
    """A control: of each layer as many experts as are selected, lowest scores first, lower id first on ties."""
    return {
        layer: sorted(score, key=lambda expert: (score[expert], expert))[: len(selected[layer])]
        for layer, score in ((layer, as_scores(scores[layer], layer)) for layer in selected)
    }


def ranked(score: Mapping[int, float]) -> list[int]:
    """Expert ids, highest score first, lower id first on ties."""
    return sorted(score, key=lambda expert: (-score[expert], expert))


def as_scores(values: Sequence[float] | Mapping, layer: Hashable = "?") -> dict[int, float]:
    """{expert id: score} of one layer; UserError naming the layer where a score is no number of at least zero.

    A number of single precision is taken as the shortest decimal that it prints as: 0.0653 stays 0.0653.
    """
    pairs = values.items() if isinstance(values, Mapping) else enumerate(_as_list(values))
    scores = {}
    for expert, value in pairs:
        try:
            scores[int(expert)] = float(value)
        except (TypeError, ValueError):
            raise UserError(f"layer {layer}, expert {expert}: {value!r} is not a score") from None
        if not (math.isfinite(scores[int(expert)]) and float(value) >= 0):
            raise UserError(f"layer {layer}, expert {expert}: score {value} has to be a number of at least 0")
    return scores


def _as_list(values) -> list:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.numpy() if str(values.dtype) in ("torch.float32", "torch.float64") else values.double().numpy()
    if getattr(values, "dtype", None) == "float32":
        return [float(str(value)) for value in values]
    return list(values)
