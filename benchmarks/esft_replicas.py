"""Copies of frozen experts in spare seats: how even the load of ranks is, and how many rows travel.

    python -m benchmarks.esft_replicas [--json FILE]

Routing: DeepSeek-V2-Lite on the intent task of ESFT (26 layers, 8,222 tokens, top 6 of 64), published expert config, of
which only frozen experts are copied. Each of EP ranks holds 64 / EP experts and `spare` copies a layer. The tokens are
dealt to the ranks in their order, as many to each, and every slot goes where `Placement.copies` of its rank sends it;
that is counted. Figures are means over layers:

  load       largest rank load over the mean load
  rows       distinct (token, other rank) pairs for each token: what a dispatch without duplicates sends, each way
  unseen ... the same on one half of the documents, placed by the other half (both ways)

The peer is `balance` without copies. `bound`: no rank can have less than the hottest expert that trains, nor
all of them less than the mean. The exit code is 1 where the load at EP = 16 with one spare seat is more than 1 % above
it. Needs the routing, found as ../shared/data/esft beside the checkout; without it nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks._harness import Missed, row, run
from benchmarks.esft_placement import DATA, EXPERTS, SIZES, loads_by_layer
from moe_dist.config.expert_files import read_expert_config
from moe_dist.moe.placement import Placement, balance, from_lists

SPARES = (1, 2)
HIDDEN = 2048  # of DeepSeek-V2-Lite


def main() -> None:
    run("esft_replicas", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict | str]:
    if not (DATA / "intent_routing.npz").is_file():
        yield "No rows: the routing of the intent task is not in ../shared/data/esft beside the checkout."
        return
    with np.load(DATA / "intent_routing.npz") as file:
        ids_LTK, lengths = file["expert_ids"].astype(np.int64), file["doc_lengths"]
    trainable = list(read_expert_config(DATA / "intent_expert_config.json").experts.values())
    even_T = np.repeat(np.arange(len(lengths)), lengths) % 2 == 0
    parts = {"": [(ids_LTK, ids_LTK)], "unseen ": [(ids_LTK[:, a], ids_LTK[:, ~a]) for a in (even_T, ~even_T)]}
    missed, saved, bounds = [], [], []
    for size in SIZES:
        layers = zip(loads_by_layer(ids_LTK), trainable, strict=True)
        bound = float(np.mean([least(load_E, train, size) for load_E, train in layers]))
        bounds.append(f"EP={size}: {bound:.4f}")
        for what, halves in parts.items():
            plain, *copied = (figures(halves, trainable, size, spare) for spare in (0, *SPARES))
            for spare, (load, rows) in zip(SPARES, copied, strict=True):
                case = f"EP={size}, spare {spare}"
                limit = {} if what else {"bound": round(bound, 4)}
                yield row(f"{what}load, {case}", load, plain[0], "no copies", "max/mean") | limit
                yield row(f"{what}rows, {case}", rows, plain[1], "no copies", "rows/token")
                if not what:
                    saved.append(f"{case}: {2 * HIDDEN * (plain[1] - rows):,.0f}")
                if not what and (size, spare) == (16, 1) and load > 1.01 * bound:
                    missed.append(f"load at {case} is {load / bound - 1:.2%} above the bound")
    yield f"Least possible load over mean: {', '.join(bounds)}."
    yield f"Bytes that a token's rows save in bf16, a layer and way: {'; '.join(saved)}."
    if missed:
        raise Missed("; ".join(missed))


def figures(
    halves: list[tuple[np.ndarray, np.ndarray]], trainable: list[list[int]], size: int, spare: int
) -> tuple[float, float]:
    """Mean over layers, and over pairs of (ids to place by, ids to count): largest load over mean, rows a token."""
    found = [
        counted(placed(load_E, train, size, spare), ids_TK)
        for seen_LTK, measured_LTK in halves
        for load_E, train, ids_TK in zip(loads_by_layer(seen_LTK), trainable, measured_LTK, strict=True)
    ]
    return tuple(float(figure) for figure in np.mean(found, axis=0))


def placed(load_E: np.ndarray, train: list[int], size: int, spare: int) -> Placement:
    lists = balance(load_E, ranks=size, trainable=train, spare=spare)
    return from_lists(lists, num_experts=EXPERTS, trainable=train, load_E=load_E)


def counted(placement: Placement, ids_TK: np.ndarray) -> tuple[float, float]:
    """Largest rank load over the mean, and rows to other ranks over tokens, of a layer."""
    size = len(placement.ranks)
    rank_of_place = np.repeat(np.arange(size), placement.held)
    load_P, rows = np.zeros(size, dtype=np.int64), 0
    for source, mine_TK in enumerate(np.array_split(ids_TK, size)):
        rank_TK = rank_of_place[placement.copies(source).places(torch.from_numpy(mine_TK)).numpy()]
        load_P += np.bincount(rank_TK.ravel(), minlength=size)
        goes_TP = np.zeros((len(mine_TK), size), dtype=bool)
        np.put_along_axis(goes_TP, rank_TK, True, axis=1)
        goes_TP[:, source] = False
        rows += int(goes_TP.sum())
    return load_P.max() * size / load_P.sum(), rows / len(ids_TK)


def least(load_E: np.ndarray, train: list[int], size: int) -> float:
    """No placement whose trainable experts are on one rank each has a smaller largest load over the mean."""
    return max(1.0, float(max(load_E[train]) * size / load_E.sum()))


if __name__ == "__main__":
    main()
