"""Which sizes of the axes fit a number of ranks. Numbers alone: nothing here needs torch."""

from __future__ import annotations

from moe_dist.errors import UserError


def check_sizes(world: int, *, expert: int = 1, pipeline: int = 1, sequence: int = 1, tensor: int = 1) -> None:
    """Raise `UserError` for a layout that `world` ranks cannot form, saying what would work."""
    for name, size in (("pipeline", pipeline), ("sequence", sequence), ("tensor", tensor), ("expert", expert)):
        if size < 1:
            raise UserError(f"parallel.{name}={size}: a size is at least 1")
    axes = pipeline * sequence * tensor
    asked = " x ".join(
        f"parallel.{name}={size}"
        for name, size in (("pipeline", pipeline), ("sequence", sequence), ("tensor", tensor))
        if size > 1
    )
    if world % axes:
        more = -(-world // axes) * axes
        raise UserError(
            f"{asked} does not fit {world} rank(s): {axes} must divide the number of ranks. Start {more} ranks"
            + (f" or {world // axes * axes}" if world > axes else "")
            + f", or choose sizes whose product is one of {_listed(_divisors(world))}"
        )
    stage = world // pipeline
    if stage % expert:
        where = f"the {stage} rank(s) of a pipeline stage" if pipeline > 1 else f"{world} rank(s)"
        raise UserError(
            f"parallel.expert={expert} does not fit {where}: the expert-parallel size must divide data x sequence x "
            f"tensor. What works here: {_listed(_divisors(stage))}; or start more ranks"
        )


def _divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
