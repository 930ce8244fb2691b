"""Ranks that a benchmark starts: rank 0's lines come as they are made, and no end is a failure."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from benchmarks._harness import Missed
from benchmarks._ranks import on_ranks


def lines(how: str):
    total = torch.ones(1) * dist.get_rank()
    dist.all_reduce(total)
    yield f"rank {dist.get_rank()}, sum {int(total)}, {torch.get_num_threads()} thread"
    if how == "missed":
        raise Missed("a goal")
    if how == "dies" and dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()
    yield "after"


def test_lines_of_rank_0():
    assert list(on_ranks(3, lines, "well")) == ["rank 0, sum 3, 1 thread", "after"]


@pytest.mark.parametrize(("how", "message"), [("missed", "a goal"), ("dies", "the ranks did not come to their end")])
def test_what_does_not_end_well(how, message):
    found = on_ranks(2, lines, how)
    assert next(found) == "rank 0, sum 1, 1 thread"
    with pytest.raises(Missed, match=message):
        next(found)
