"""The schedule: every micro-batch comes to every stage in order, and what travels is what was given."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from moe_dist.errors import UserError
from moe_dist.parallel.grid import build_grid
from moe_dist.parallel.traffic import count_traffic
from moe_dist.train.pipeline import run_schedule

SHAPE = (2, 3, 4)
TRAVELS = [torch.empty(SHAPE, device="meta"), torch.empty(5, dtype=torch.float64, device="meta")]


class Recorder:
    """A stage that adds its number to what it gets, forwards and backwards, and writes down what comes."""

    def __init__(self, grid, harm: tuple[int, int] | None = None):
        self.grid, self.harm = grid, harm
        self.events: list[tuple] = []
        self.under_way = self.most = 0

    def forward(self, number, *received):
        if self.harm == (self.grid.pipeline_rank, number):
            raise UserError("this micro-batch is bad")
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        hidden, *loads = received or (torch.full(SHAPE, float(number)), torch.zeros(5, dtype=torch.float64))
        self.events.append(("forward", number, hidden.unique().tolist(), *(load.unique().tolist() for load in loads)))
        if self.grid.is_last_stage:
            return ()
        return hidden.detach() + 1, *(load.detach() + 10 for load in loads)

    def backward(self, number, *received):
        self.under_way -= 1
        gradient, loads = received or (torch.full(SHAPE, 100.0 * number), torch.full((5,), 7.0, dtype=torch.float64))
        self.events.append(("backward", number, gradient.unique().tolist(), loads.unique().tolist()))
        return () if self.grid.is_first_stage else (gradient + 1, loads)


def scheduled(micro_batches: int, backward: bool) -> dict:
    grid = build_grid(pipeline=torch.distributed.get_world_size())
    work = Recorder(grid)
    with count_traffic() as traffic:
        run_schedule(work, micro_batches, TRAVELS, grid, backward=backward)
    names = ("activations", "activation gradients")
    return {"events": work.events, "most": work.most, "bytes": [traffic.bytes(name) for name in names]}


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (2, 2), (2, 5), (4, 1), (4, 3), (4, 6)])
def test_every_micro_batch_comes_to_every_stage_in_order(ranks, stages, micro_batches):
    for stage, found in enumerate(ranks(stages, scheduled, micro_batches, True)):
        forwards = [event[1:] for event in found["events"] if event[0] == "forward"]
        backwards = [event[1:] for event in found["events"] if event[0] == "backward"]
        assert forwards == [(number, [number + stage], [10.0 * stage]) for number in range(micro_batches)]
        after = stages - 1 - stage
        assert backwards == [(number, [100.0 * number + after], [7.0]) for number in range(micro_batches)]
        # 1F1B: no stage keeps more micro-batches than there are stages from it to the last.
        assert found["most"] == (min(micro_batches, stages - stage) if micro_batches >= stages else micro_batches)
        one = 2 * 3 * 4 * 4 + 5 * 8
        assert found["bytes"] == [one * micro_batches * (after > 0), one * micro_batches * (stage > 0)]


def test_forwards_alone(ranks):
    for stage, found in enumerate(ranks(2, scheduled, 3, False)):
        assert found["events"] == [("forward", number, [number + stage], [10.0 * stage]) for number in range(3)]


def buffers(micro_batches: int) -> int:
    """The most bytes of received tensors that were alive at once."""
    grid = build_grid(pipeline=2)
    work = Recorder(grid)
    most, original = 0, PipelineStage.forward_one_chunk

    def watched(stage, *args, **options):
        nonlocal most
        kept = [*stage.args_recv_info.values(), *stage.grad_recv_info.values()]
        infos = [info for infos in kept for info in infos]
        alive = [info.buffer for info in infos if info.buffer is not None and not info.buffer.is_meta]
        most = max(most, len(alive))
        return original(stage, *args, **options)

    PipelineStage.forward_one_chunk = watched
    try:
        run_schedule(work, micro_batches, TRAVELS, grid, backward=True)
    finally:
        PipelineStage.forward_one_chunk = original
    return most


def test_received_tensors_do_not_outlive_their_backward(ranks):
    first, last = ranks(2, buffers, 7)
    assert (first, last) == (0, 2)  # gradients are dropped at once; the last stage has one micro-batch under way


def failing() -> str:
    grid = build_grid(pipeline=2)
    try:
        run_schedule(Recorder(grid, harm=(1, 0)), 1, TRAVELS, grid, backward=False)
    except UserError as error:
        return str(error)
    return "nothing"


def test_what_a_forward_raises_comes_out_as_it_is(ranks):
    assert ranks(2, failing) == ["nothing", "this micro-batch is bad"]
