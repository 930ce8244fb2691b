"""What is under way while something else computes: the order in which rows leave and land, and experts compute."""

from __future__ import annotations

from unittest.mock import patch

import torch

from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import contiguous
from moe_dist.ops import experts_grouped
from moe_dist.parallel import collectives
from moe_dist.parallel.grid import build_grid

TOKENS, EXPERTS, HIDDEN, WIDTH = 12, 4, 16, 8


def events_of_a_step(chunks: int) -> tuple[list[str], list[str]]:
    """On each rank, of forward and backward: rows that leave and land, products of experts, weight gradients."""
    grid = build_grid(expert=2)
    layer = MoEExperts(ExpertSpec(EXPERTS, HIDDEN, WIDTH), contiguous(EXPERTS, ranks=2), grid)
    layer.dispatcher, layer.chunks, layer.backend = "dedup", chunks, "grouped"
    events: list[str] = []
    start, land = collectives.start_exchange, collectives.Flight.land
    names = {}  # of each flight, by the memory that it lands in

    def started(*args, what):
        flight = start(*args, what=what)
        names[id(flight)] = what
        events.append(f"{what} leave")
        return flight

    def landed(flight):
        if id(flight) in names:
            events.append(f"{names[id(flight)]} land")
        return land(flight)

    def seen(name, function):
        return lambda *args, **options: events.append(name) or function(*args, **options)

    generator = torch.Generator().manual_seed(grid.rank)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    ids_TK = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :2]
    probs_TK = torch.rand(TOKENS, 2, generator=generator, requires_grad=True)
    with (
        patch("moe_dist.moe.hop.start_exchange", started),
        patch.object(collectives.Flight, "land", landed),
        patch.object(experts_grouped, "forward", seen("products", experts_grouped.forward)),
        patch.object(experts_grouped._Products, "weight_grad", seen("weights", experts_grouped._Products.weight_grad)),
    ):
        y_TH = layer(x_TH, ids_TK, probs_TK)
        forward = events.copy()
        events.clear()
        y_TH.sum().backward()
    return forward, events


def test_weight_gradients_are_computed_while_the_rows_travel(ranks):
    for _, backward in ranks(2, events_of_a_step, 1):
        assert backward == [
            "rows leave",
            "rows land",
            "rows back leave",
            "scalars back leave",
            "weights",
            "weights",
            "rows back land",
            "scalars back land",
        ]


def test_a_part_travels_while_another_is_computed(ranks):
    for forward, backward in ranks(2, events_of_a_step, 2):
        assert forward == [
            "rows leave",
            "rows leave",
            "rows land",
            "products",
            "rows back leave",
            "rows land",
            "products",
            "rows back leave",
            "rows back land",
            "rows back land",
        ]
        first_home, second_arrival = (
            backward.index("rows back leave"),
            len(backward) - 1 - backward[::-1].index("rows land"),
        )
        assert first_home < second_arrival < backward.index("rows back land")
