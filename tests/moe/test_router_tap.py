"""The tap on real families: transformers' own balance loss from outside the model, at any expert-parallel size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from moe_dist.errors import UserError
from moe_dist.models import load_model
from moe_dist.models.recompute import enable_recompute
from moe_dist.models.routers import router_sites
from moe_dist.models.surgery import swap
from moe_dist.moe.router_tap import FORMS, RouterTap, double_balance_warning
from moe_dist.parallel.grid import Grid, build_grid
from tests.models.tiny import CONFIGS, VOCAB, make_folder
from tests.reference import relative_error

WITH_OWN_LOSS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"]


def batch(real_rows: int = 4) -> dict[str, torch.Tensor]:
    """Four sequences; the first half of the batch has much more padding than the second. Late rows may be empty."""
    ids = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 2:] = mask[1, 7:] = mask[3, 11:] = mask[real_rows:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tapped(folder: Path, form: str, expert: int, *, coef=1.0, z_coef=0.0, prepare=None, real_rows=4) -> dict:
    """The router losses of this rank's part of the batch, and the dense gradients of their share alone."""
    grid = build_grid(expert=expert)
    model = load_model(folder, grid).train()
    if prepare is not None:
        prepare(model)
    tap = RouterTap(router_sites(model))
    part = {key: value.chunk(grid.world)[grid.rank] for key, value in batch(real_rows).items()}
    tap.start_step()
    with tap:
        model(**part, use_cache=False)
    losses = tap.loss_share(form, coef=coef, z_coef=z_coef, mask_BL=part["attention_mask"], grid=grid)
    losses.share.backward()
    dense = [(name, p) for name, p in model.named_parameters() if not getattr(p, "is_expert", False)]
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in dense}
    return {"share": losses.share.item(), "balance": losses.balance.item(), "z": losses.z.item(), "grads": grads}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("family", WITH_OWN_LOSS)
def test_hf_is_the_loss_that_transformers_adds(ranks, tmp_path, family, world):
    folder = make_folder(family, tmp_path / family)
    results = ranks(world, tapped, folder, "hf", world)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    aux_loss = plain(**batch(), output_router_logits=True).aux_loss
    aux_loss.backward()
    assert sum(result["share"] for result in results) == pytest.approx(aux_loss.item(), rel=2e-6)
    reached = 0
    for name, parameter in plain.named_parameters():
        if name in results[0]["grads"] and parameter.grad is not None:
            total = sum(result["grads"][name] for result in results)
            assert relative_error(total, parameter.grad) < 2e-6, name
            reached += ".mlp." in name and parameter.grad.any().item()
    assert reached, "no router got a gradient"


def padded_rank(folder: Path, form: str, expert: int) -> dict:
    return tapped(folder, form, expert, z_coef=0.1, real_rows=2)


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_of_padding_alone_adds_nothing_and_holds_nobody_up(ranks, tmp_path, form):
    folder = make_folder("qwen3_moe", tmp_path / "model")
    (one,), two = ranks(1, padded_rank, folder, form, 1), ranks(2, padded_rank, folder, form, 2, timeout=30)
    mean = 2 if form == "layer_micro" else 1  # of the two ranks' losses, one of which is zero
    assert two[1]["share"] == 0.0
    assert two[0]["balance"] * mean == pytest.approx(one["balance"], rel=2e-6)
    assert two[0]["z"] == pytest.approx(one["z"], rel=2e-6)
    for name, grad in one["grads"].items():
        total = two[0]["grads"][name] + two[1]["grads"][name]
        assert total.isfinite().all(), name
        if mean == 1:
            assert relative_error(total, grad) < 2e-6, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen3_moe"])
def test_every_form_reaches_the_router(tmp_path, family, form):
    folder = make_folder(family, tmp_path / family)
    result = tapped(folder, form, 1, coef=0.5, z_coef=0.25)
    assert result["share"] == pytest.approx(0.5 * result["balance"] + 0.25 * result["z"], rel=1e-6)
    for coef, z_coef in ((0.5, None), (None, 0.25)):
        grads = tapped(folder, form, 1, coef=coef, z_coef=z_coef)["grads"]
        routers = [name for name in grads if name.endswith(("mlp.gate.weight", "mlp.router.weight"))]
        assert routers
        assert all(grads[name].any() for name in routers)


def test_recomputation_counts_and_weighs_nothing_twice(tmp_path):
    folder = make_folder("qwen3_moe", tmp_path / "model")
    once = tapped(folder, "layer_global", 1, z_coef=0.1)
    again = tapped(folder, "layer_global", 1, z_coef=0.1, prepare=enable_recompute)
    assert again["share"] == once["share"]
    for name, grad in once["grads"].items():
        assert torch.equal(again["grads"][name], grad), name


@pytest.fixture
def swapped():
    config = transformers.AutoConfig.for_model("deepseek_v3", **CONFIGS["deepseek_v3"])
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    swap(model, Grid.single())
    return model


def test_the_tap_hears_what_happens_inside_it_alone(swapped):
    tap, mask = RouterTap(router_sites(swapped)), torch.ones(1, 5)
    ask = {"coef": 1.0, "mask_BL": mask, "grid": Grid.single()}
    with tap:
        swapped(torch.ones(1, 5, dtype=torch.long))
    swapped(torch.ones(1, 9, dtype=torch.long))
    assert tap.loss_share("layer_micro", **ask).share > 0
    with pytest.raises(AssertionError, match="no forward inside the tap"):
        tap.loss_share("layer_micro", **ask)
    with tap:
        swapped(torch.ones(1, 5, dtype=torch.long))
        with pytest.raises(AssertionError, match="ran twice"):
            swapped(torch.ones(1, 5, dtype=torch.long))
    with torch.no_grad(), tap:
        swapped(torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(AssertionError, match="no graph"):
        tap.loss_share("layer_micro", **ask)


def test_layer_global_remembers_until_the_next_step(swapped):
    tap, generator = RouterTap(router_sites(swapped)), torch.Generator().manual_seed(1)
    batches = [torch.randint(3, VOCAB, (1, 7), generator=generator) for _ in range(2)]

    def loss(ids) -> float:
        with tap:
            swapped(ids)
        return tap.loss_share("layer_global", coef=1.0, mask_BL=torch.ones_like(ids), grid=Grid.single()).share.item()

    tap.start_step()
    first, second = loss(batches[0]), loss(batches[1])
    tap.start_step()
    assert loss(batches[1]) != second
    tap.start_step()
    assert (loss(batches[0]), loss(batches[1])) == (first, second)


@pytest.mark.parametrize(("coef", "z_coef"), [(None, None), (0.0, 0.0)])
def test_none_and_zero_are_off(swapped, coef, z_coef):
    tap = RouterTap(router_sites(swapped))
    with tap:
        swapped(torch.ones(1, 5, dtype=torch.long))
    losses = tap.loss_share("hf", coef=coef, z_coef=z_coef, mask_BL=torch.ones(1, 5), grid=Grid.single())
    assert [part.item() for part in losses[:3]] == [0.0, 0.0, 0.0]
    assert not losses.share.requires_grad


def test_an_unknown_form_is_refused(swapped):
    tap = RouterTap(router_sites(swapped))
    with pytest.raises(UserError, match="layer_macro: expected none, hf, layer_micro"):
        tap.loss_share("layer_macro", coef=1.0, mask_BL=torch.ones(1, 5), grid=Grid.single())


@pytest.mark.parametrize("family", CONFIGS)
def test_the_router_of_every_family_is_found(family):
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    layers = swap(model, Grid.single(), device="meta")
    sites = router_sites(model)
    assert [site.experts for site in sites] == [layer for _, layer in layers]
    for site in sites:
        assert site.router.weight.shape[0] == site.experts.spec.num_experts
        assert site.score == ("sigmoid" if family == "deepseek_v3" else "softmax")
        assert site.bias_name == ("e_score_correction_bias" if family == "deepseek_v3" else None)


def test_a_model_balanced_twice_is_warned_about(swapped):
    sites = router_sites(swapped)
    assert "balances its experts by a bias" in double_balance_warning(sites, "hf", 0.01)
    for form, coef in (("none", 0.01), ("hf", 0.0), ("hf", None)):
        assert double_balance_warning(sites, form, coef) is None
