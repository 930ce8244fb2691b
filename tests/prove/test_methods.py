"""`prove` on runs of ESFT and of Nexus: those of their planted faults that a run can show are noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.methods.nexus.tiny import ROUTERS, nexus_folder
from tests.models.tiny import make_folder
from tests.mutants import test_esft as esft
from tests.mutants import test_nexus as nexus
from tests.mutants.fault import BASE, Fault
from tests.mutants.planting import Planting
from tests.prove.cases import certificate_of, config_of, first_off, prepared

ESFT = replace(BASE, trainable="one layer", stage=2)
NEXUS = replace(BASE, layout=(1, 1), balance="hf")
# Rounding alone moves the gradient of τ here by more than the tolerance: a sum of which most cancels.
CANCELLING = {"num_experts": 5, "seed": 0}
# The first check that does not hold.
NOTICED = {
    ("esft", "frozen experts decay"): "loss",
    ("esft", "masters in bf16"): "loss",
    ("esft", "state of frozen experts"): "backward",
    ("esft", "backward below the lowest layer"): "backward",
    ("prototype", "shared expert forgotten"): "logits",
    ("prototype", "renormalised at top 1"): "logits",
    ("prototype", "rows detached"): "gradients",
    ("prototype", "common part stays"): "logits",
    ("prototype", "balance coefficient forgotten"): "gradients",
    ("paper", "centre moves with a new expert"): "logits",
    ("bf16", "router in bf16"): "bf16 router",
    ("bf16", "statistics rounded"): "bf16 statistics",
    ("bf16", "halved"): "bf16 gradients, dense",
}


def halved_in_bf16(original):
    def backward(self, loss, *, last):
        original(self, loss / 2 if self.module.dtype == torch.bfloat16 else loss, last=last)

    return backward


HALVED = Fault("moe_dist.train.deepspeed_seam:DeepSpeedBackend.backward", halved_in_bf16)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp(kind)
            if kind == "esft":  # the second layer trains, the first does not
                config = config_of(ESFT, str(make_folder("qwen3_moe", path / "model", num_hidden_layers=3)))
                config.trainable.experts = {"1": [0, 2, 3]}
                config.model.attention = None
            else:
                router = kind if kind in ROUTERS else "prototype"
                config = config_of(NEXUS, str(nexus_folder("llama", path / "model", router=router, num_experts=4)))
                if kind == "bf16":
                    config.train.precision = "bf16"
            made[kind] = prepared(config, (ESFT if kind == "esft" else NEXUS).world, path / "proof")
        return made[kind]

    return get


@pytest.mark.parametrize("kind", ["esft", "bf16", *ROUTERS])
def test_no_alarm_without_a_fault(ranks, problems, kind):
    problem = problems(kind)
    for certificate in ranks(2 if kind == "esft" else 1, certificate_of, problem, timeout=90):
        assert certificate.holds, certificate.text()


@pytest.mark.parametrize(("kind", "name"), NOTICED)
def test_the_fault_is_noticed(ranks, problems, kind, name):
    faults = {case: found.fault for case, found in (esft.CASES | nexus.CASES).items()} | {"halved": HALVED}
    planted = Planting(ranks, faults[name])
    for check in planted(2 if kind == "esft" else 1, first_off, problems(kind), timeout=60):
        assert check is not None
        assert check.name == NOTICED[kind, name]


def test_what_rounding_alone_moves_is_allowed_and_named(ranks, tmp_path):
    folder = nexus_folder("qwen3", tmp_path / "model", router="prototype", **CANCELLING)
    (certificate,) = ranks(1, certificate_of, prepared(config_of(NEXUS, str(folder)), 1, tmp_path / "proof"))
    assert certificate.holds, certificate.text()
    (gradients,) = [check for check in certificate.checks if check.eased]
    assert set(gradients.eased) == {"model.layers.1.mlp.gate.temperature"}
    error, rounding, allowed = gradients.eased["model.layers.1.mlp.gate.temperature"]
    assert gradients.tolerance < error < allowed < 5 * rounding < 1e-3
    assert "the plain process itself" in certificate.text()
