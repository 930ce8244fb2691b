"""Bytes on the wire: what the plan says against what is counted in real training steps."""

from __future__ import annotations

import pytest

from benchmarks._plan_runs import STEPS, config, measure
from moe_dist.config.checks import accumulation
from moe_dist.config.schema import RunConfig
from moe_dist.moe.traffic_model import Group, counted_flows, step_bytes
from moe_dist.planner.search import layout_of
from moe_dist.planner.study import Study

ALIGNED = 128  # bytes: DeepSpeed fills each group of parameters up to a multiple of its ranks
EXPERTS = ("counts", "slots", "rows", "rows back", "scalars back")


def settings_of(world: int, changes: dict) -> RunConfig:
    return config(world, **{"length": 96, "layers": 2} | changes)


def counted(world: int, changes: dict) -> dict:
    settings = settings_of(world, changes)
    # Every step sends the same; but ZeRO 3 has to learn the order of the modules first.
    steps = STEPS if settings.parallel.zero_stage == 3 else 1
    return measure(settings, accumulation(settings, world), steps=steps)


def planned(world: int, changes: dict):
    settings = settings_of(world, changes)
    study = Study(settings, device="cpu")
    return study, layout_of(settings, world, node_size=world)


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor": 2, "precision": "fp32"},
        {"tensor": 2, "family": "deepseek_v3", "recompute": True},
        {"sequence": 2},
        {"sequence": 2, "family": "deepseek_v3", "precision": "fp32", "recompute": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_tensor_and_sequence_send_what_the_trace_counts(ranks, changes):
    study, layout = planned(2, changes)
    wire = study.wire(layout, 0)
    for found in ranks(2, counted, 2, changes):
        sent = found["sent"]
        assert sum(sent.get(what, 0) for what in ("tensor gather", "tensor scatter", "vocabulary")) == wire.tensor
        assert sent.get("sequence", 0) == wire.sequence
    assert wire.tensor + wire.sequence > 0


def test_stages_send_hidden_states_and_their_gradients(ranks):
    changes = {"pipeline": 2, "micro_batches": 3, "precision": "fp32"}
    study, layout = planned(2, changes)
    for stage, found in enumerate(ranks(2, counted, 2, changes)):
        sent = found["sent"]
        assert sent.get("activations", 0) + sent.get("activation gradients", 0) == study.wire(layout, stage).pipeline


@pytest.mark.parametrize("dispatcher", ["dedup", "alltoall"])
def test_experts_send_what_the_model_of_the_traffic_says_for_the_same_routing(ranks, dispatcher):
    changes = {"expert": 2, "dispatcher": dispatcher}
    study, layout = planned(2, changes)
    found = ranks(2, counted, 2, changes)
    total = sum(one["sent"].get(what, 0) for one in found for what in EXPERTS)
    expected = 0.0
    for name, of_rank in found[0]["chosen"].items():
        for number in range(len(of_rank)):
            group = Group.even(2, experts=8, node_size=2)
            ids = [one["chosen"][name][number] for one in found]
            flows = counted_flows(dispatcher, group, ids)
            expected += step_bytes(dispatcher, flows, group, hidden=128, top_k=2, row_bytes=2, back_bytes=2).total
    assert total == expected
    # What the plan expects, of experts that are all used alike, is near to that.
    wire = study.wire(layout, 0)
    assert 2 * (wire.experts_inside + wire.experts_across) == pytest.approx(total, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_data_collectives_have_the_payloads_of_the_engine(ranks, zero_stage, precision):
    changes = {"zero_stage": zero_stage, "precision": precision}
    study, layout = planned(2, changes)
    wanted = study.collectives(layout, 0)
    found = {kind: size for (kind, _), size in ranks(2, counted, 2, changes)[0]["collectives"].items()}
    assert found.keys() == {one.kind for one in wanted}
    for kind, size in found.items():
        assert size == pytest.approx(sum(one.payload for one in wanted if one.kind == kind), abs=ALIGNED)


def test_families_are_reduced_over_their_own_replicas(ranks):
    changes = {"expert": 2, "tensor": 2, "zero_stage": 1}
    study, layout = planned(4, changes)
    replicas = study.settings(layout, 0).replicas
    wanted: dict = {}
    for one in study.collectives(layout, 0):
        key = one.kind, replicas[one.family]
        wanted[key] = wanted.get(key, 0) + one.payload
    one = ranks(4, counted, 4, changes)[0]
    found = one["collectives"]
    # Of the gathers over two ranks those of the tensor axis are not the engine's: each rank has sent half of each.
    found["all_gather", 2] -= 2 * (one["sent"]["tensor gather"] + one["sent"]["vocabulary"])
    assert found.keys() == wanted.keys()
    for key, size in found.items():
        assert size == pytest.approx(wanted[key], abs=ALIGNED)
