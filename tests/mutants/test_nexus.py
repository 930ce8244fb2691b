"""Faults planted in Nexus: each makes one of its acceptance checks fail, or a receipt, which pass without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.data import test_sampler as sampler
from tests.methods.nexus import test_domains as domains
from tests.methods.nexus import test_extend as extend
from tests.methods.nexus import test_model as model
from tests.methods.nexus import test_receipt as receipt
from tests.methods.nexus import test_router as router
from tests.methods.nexus import test_stock as stock
from tests.methods.nexus import test_training as training
from tests.methods.nexus import test_upcycle as upcycle
from tests.methods.nexus.test_domains import place  # noqa: F401 - a fixture
from tests.methods.nexus.test_extend import made  # noqa: F401 - a fixture
from tests.mutants.fault import Fault
from tests.mutants.planting import Case, Planting

# Means and where tensors come from


def mean_in_the_models_dtype(original):
    def mean(tensors):
        total = tensors[0].clone()
        for tensor in tensors[1:]:
            total += tensor
        return total / len(tensors)

    return mean


def seed_in_the_mean(original):
    def make_plan(config):
        plan = original(config)
        parts = [
            replace(part, sources=((plan.seed, part.sources[0][1]), *part.sources)) if len(part.sources) > 1 else part
            for part in plan.parts
        ]
        return replace(plan, parts=tuple(parts))

    return make_plan


def rows_in_another_order(original):
    """The domains' rows stay in the order of their file and not of the experts."""

    def chosen(config, seed):
        found = original(config, seed)
        return replace(found, embeddings_NM=found.embeddings_NM.flip(0), prototypes_LNH=found.prototypes_LNH.flip(1))

    return chosen


# Embeddings


def embeddings_not_centred(original):
    return lambda means_NM, base: torch.zeros_like(means_NM[0])


def any_space_will_do(original):
    return lambda self, space, *, where: None


def lengths_of_embeddings_kept(original):
    return property(lambda self: self.embeddings_NM)


# Block and router


def shared_expert_forgotten(original):
    def forward(self, hidden_states):
        shared, self.shared_expert = self.shared_expert, None
        try:
            return original(self, hidden_states)
        finally:
            self.shared_expert = shared

    return forward


def renormalised_at_top_1(original):
    def forward(self, hidden_states):
        logits_TE, weights_TK, ids_TK = original(self, hidden_states)
        return logits_TE, weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK

    return forward


def router_in_the_models_dtype(original):
    return lambda self, tensor: tensor


def statistics_rounded(original):
    """Domain embeddings and the inputs' mean take the model's dtype when it is loaded."""
    return ()


def rows_kept_for_ever(original):
    def rows(self):
        if self.training or torch.is_grad_enabled():
            return original(self)
        if self._kept is None:
            self._kept = (None, self.fold())
        return self._kept[1]

    return rows


def rows_detached(original):
    return lambda self: original(self).detach()


def centred_over_the_experts_there_are(original):
    """A further domain moves the centre, and with it the rows of the others."""

    def fold(self):
        kept = self.domain_embeddings
        self.domain_embeddings = kept - kept.mean(0)
        try:
            return original(self)
        finally:
            self.domain_embeddings = kept

    return fold


def common_part_stays(original):
    """The prototype's row keeps what it shares with all inputs."""

    def row(self, d_M, w1, w2):
        gate_H, up_H = torch.mv(w1, d_M).chunk(2)
        moved_H = d_M + torch.mv(w2, F.silu(gate_H) * up_H)
        return self.temperature / self.input_length * F.normalize(moved_H, dim=0)

    return row


# Extension and removal


def share_of_the_old_count(original):
    return lambda config, model: 1 / model.num_experts


def later_experts_do_not_move_up(original):
    """After a removal the expert that was taken out stays, and the last one is missing."""

    def mean_of(key, source, models):
        return original(key, key if key in models[0].tensors else source, models)

    return mean_of


def first_rows_kept(original):
    return lambda model, key, rows: model.read(key)[: len(rows)]


def rows_drawn_as_at_the_start(original):
    return lambda key, entry, std, seed: original(key.partition(" of ")[0], entry, std, seed)


# Training


def balance_coefficient_forgotten(original):
    return lambda self, batch: original(self, batch) / self.settings.balance_coef


def weights_of_domains_ignored(original):
    return lambda weights, sources: original([1.0] * sources, sources)


# Export and receipts


def shared_expert_not_doubled(original):
    return lambda model, key: model.read(key)


def fold_without_length(original):
    return lambda model, path, dtype: F.normalize(original(model, path, dtype), dim=1)


def distances_not_measured(original):
    return lambda found, expected: 0.0


def bits_not_compared(original):
    return lambda found, expected: True


@dataclass
class Setting:
    """What a check may ask for. made, place: the fixtures of the same name, whose folders were made without a fault."""

    ranks: object
    made: object
    place: object
    path: Path
    monkeypatch: pytest.MonkeyPatch


NEXUS, ROUTER = "moe_dist.methods.nexus", "moe_dist.models.nexus.router_nexus"
BALANCED = training._cell(layout=(2, 2), balance="hf")


def n3(at: Setting) -> None:
    upcycle.test_n3_every_tensor_comes_from_where_it_must(at.path, "llama", torch.bfloat16)


def n4(at: Setting) -> None:
    extend.test_n4_every_tensor_after_an_extension(at.made, at.path, "llama")


def n9(at: Setting) -> None:
    extend.test_n1_n9_old_experts_route_as_before_and_removal_restores_the_layers(at.made, at.path, "prototype")


def served(at: Setting) -> None:
    stock.test_a_stock_qwen2_moe_has_the_same_logits(at.path, "llama", "prototype")


CASES = {
    "mean in bf16": Case(Fault(f"{NEXUS}.parts:mean", mean_in_the_models_dtype), n3),
    "seed in the mean": Case(Fault(f"{NEXUS}.upcycle:make_plan", seed_in_the_mean), n3),
    "rows in another order": Case(Fault(f"{NEXUS}.upcycle:_domains", rows_in_another_order), n3),
    "not centred": Case(
        Fault(f"{NEXUS}.domains:_centre", embeddings_not_centred),
        lambda at: domains.test_embeddings_and_prototypes_are_centred_means_over_documents(at.place),
    ),
    "any space will do": Case(
        Fault(f"{NEXUS}.domain_file:Domains.check_same_space", any_space_will_do),
        lambda at: extend.test_what_cannot_be_extended(at.made, at.path),
    ),
    "lengths of embeddings kept": Case(
        Fault(f"{NEXUS}.domain_file:Domains.directions_NM", lengths_of_embeddings_kept),
        lambda at: upcycle.test_paper_router_takes_the_embeddings(at.path),
    ),
    "shared expert forgotten": Case(
        Fault("moe_dist.models.nexus.modeling_nexus:NexusBlock.forward", shared_expert_forgotten),
        lambda at: model.test_n2_identical_experts_give_one_plus_gate_times_the_mlp("llama", at.path),
    ),
    "renormalised at top 1": Case(
        Fault(f"{ROUTER}:NexusRouter.forward", renormalised_at_top_1),
        lambda at: router.test_forward_follows_the_formula("prototype", False, 1),
    ),
    "router in bf16": Case(
        Fault(f"{ROUTER}:NexusRouter.wide", router_in_the_models_dtype),
        lambda at: router.test_logits_are_float32_in_a_bfloat16_model("paper"),
    ),
    "statistics rounded": Case(
        Fault("moe_dist.models.nexus.modeling_nexus:NexusModel._keep_in_fp32_modules_strict", statistics_rounded),
        lambda at: model.test_load_and_export_change_no_bit("llama", torch.bfloat16, at.path),
    ),
    "rows kept for ever": Case(
        Fault(f"{ROUTER}:NexusRouter.rows", rows_kept_for_ever),
        lambda at: router.test_n7_kept_rows_are_forgotten_when_a_weight_may_have_changed("prototype"),
    ),
    "rows detached": Case(
        Fault(f"{ROUTER}:NexusRouter.rows", rows_detached),
        lambda at: router.test_n6_the_gate_alone_carries_gradient_to_the_router("paper"),
    ),
    "centre moves with a new expert": Case(
        Fault(f"{ROUTER}:PaperRouter.fold", centred_over_the_experts_there_are),
        lambda at: router.test_n1_appending_a_domain_leaves_the_others_as_they_are("paper"),
    ),
    "common part stays": Case(
        Fault(f"{ROUTER}:PrototypeRouter.row", common_part_stays),
        lambda at: router.test_prototype_sees_no_common_part_and_no_length(),
    ),
    "merged by 1/n": Case(Fault(f"{NEXUS}.extend:merge_share", share_of_the_old_count), n4),
    "experts do not move up": Case(Fault(f"{NEXUS}.extend:mean_of", later_experts_do_not_move_up), n9),
    "rows do not move up": Case(Fault(f"{NEXUS}.extend:_rows", first_rows_kept), n9),
    "rows drawn as at the start": Case(
        Fault(f"{NEXUS}.extend:random", rows_drawn_as_at_the_start),
        lambda at: extend.test_forms_of_a_linear_router_s_new_row(at.made, at.path),
    ),
    "balance coefficient forgotten": Case(
        Fault("moe_dist.train.routing:Routing.loss_share", balance_coefficient_forgotten),
        lambda at: training.test_parity_with_a_plain_process(at.ranks, at.path, "prototype", BALANCED, 4),
    ),
    "weights of domains ignored": Case(
        Fault("moe_dist.data.sampler:weighted_cycle", weights_of_domains_ignored),
        lambda at: sampler.test_shares_hold_in_every_window([3, 1]),
    ),
    "shared expert not doubled": Case(Fault(f"{NEXUS}.stock:_doubled", shared_expert_not_doubled), served),
    "fold without length": Case(Fault(f"{NEXUS}.stock:_folded", fold_without_length), served),
    "distances not measured": Case(
        Fault(f"{NEXUS}.receipt:_distance", distances_not_measured),
        lambda at: receipt.test_no_tensor_can_be_wrong_unnoticed(at.path, at.monkeypatch, "nexus"),
    ),
    "bits not compared": Case(
        Fault(f"{NEXUS}.receipt:_same_bits", bits_not_compared),
        lambda at: receipt.test_no_tensor_can_be_wrong_unnoticed(at.path, at.monkeypatch, "own"),
    ),
}


@pytest.fixture
def setting(ranks, made, place, tmp_path, monkeypatch) -> Setting:  # noqa: F811
    for kind in ("prototype", "linear"):
        made(router=kind)
    return Setting(ranks, made, place, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_caught(setting, name):
    case = CASES[name]
    setting.ranks = Planting(setting.ranks, case.fault)
    # A receipt raises RuntimeError; a refusal that does not come makes pytest fail the check.
    with case.fault.planted(), pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        case.check(setting)


@pytest.mark.parametrize("name", CASES)
def test_the_check_passes_without_it(setting, name):
    CASES[name].check(setting)
