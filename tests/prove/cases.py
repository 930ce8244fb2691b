"""Problems of `prove`, prepared here and judged on the ranks of a pool."""

from __future__ import annotations

from pathlib import Path

from moe_dist.config.checks import axes_of
from moe_dist.config.schema import RunConfig
from moe_dist.parallel.grid import build_grid, layout
from moe_dist.prove.certificate import Certificate, Check
from moe_dist.prove.problem import Problem
from moe_dist.prove.proof import certify, prepare
from moe_dist.prove.trial import judge
from tests.parity import problem as parity
from tests.parity.cells import Cell


def config_of(cell: Cell, folder: str) -> RunConfig:
    """The configuration of a cell of the parity matrix, with several micro-batches a step."""
    config = parity.config(cell, folder)
    config.train.global_batch_size = parity.ROWS
    return config


def prepared(config: RunConfig, world: int, out: Path, *, layers: list[int] | None = None) -> Problem:
    return prepare(config, out, layout(world, **axes_of(config)), layers=layers)


def grid_of(problem: Problem):
    parallel = problem.config.parallel
    return build_grid(**axes_of(problem.config), node_size=parallel.node_size)


def certificate_of(problem: Problem) -> Certificate:
    """On each rank."""
    certificate, grid = Certificate({}), grid_of(problem)
    certify(certificate, problem, grid)
    return certificate


def first_off(problem: Problem) -> Check | None:
    """On each rank: the first check that does not hold, after which nothing more is tried."""
    return next((check for check in judge(problem, grid_of(problem)) if not check.holds), None)
