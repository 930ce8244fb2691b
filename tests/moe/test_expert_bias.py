"""The balancing bias of DeepSeek-V3: the same bits on every rank and at every layout, and only when it may move."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from moe_dist.errors import UserError
from moe_dist.models import export_model, load_model
from moe_dist.models.routers import router_sites
from moe_dist.moe.expert_bias import ExpertBias
from moe_dist.parallel.grid import Grid, build_grid
from tests.models.tiny import VOCAB, make_folder

RATE, STEPS, MICRO_BATCHES = 0.01, 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder("deepseek_v3", tmp_path_factory.mktemp("bias") / "model", num_hidden_layers=3)


def tokens(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + micro)
    ids = torch.randint(3, VOCAB, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[2] = 0
    return ids, mask


def forward(model, ids: torch.Tensor, mask: torch.Tensor) -> None:
    for site in router_sites(model):
        site.experts.token_mask_T = mask.bool().flatten()
    model(input_ids=ids, attention_mask=mask)


def biases(model) -> list[torch.Tensor]:
    return [site.bias.clone() for site in router_sites(model)]


def train_on_a_rank(folder: Path, expert: int) -> list[torch.Tensor]:
    grid = build_grid(expert=expert)
    model = load_model(folder, grid).train()
    bias = ExpertBias(router_sites(model), rate=RATE, grid=grid)
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            ids, mask = (part.chunk(grid.world)[grid.rank] for part in tokens(step, micro))
            forward(model, ids, mask)
        bias.step()
    return biases(model)


def expected(folder: Path) -> list[torch.Tensor]:
    """One process, counting token by token what the routers return."""
    model = load_model(folder).train()
    sites = router_sites(model)
    counts = [[0] * site.experts.spec.num_experts for site in sites]
    masks: list[torch.Tensor] = []

    def listen(count, router, inputs, output):
        for chosen, real in zip(output[2].tolist(), masks[-1].flatten().tolist(), strict=True):
            for expert in chosen if real else ():
                count[expert] += 1

    for site, count in zip(sites, counts, strict=True):
        site.router.register_forward_hook(partial(listen, count))
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            ids, mask = tokens(step, micro)
            masks.append(mask)
            model(input_ids=ids, attention_mask=mask)
        for site, count in zip(sites, counts, strict=True):
            for expert, load in enumerate(count):
                mean = sum(count) / len(count)
                site.bias[expert] += RATE * ((mean > load) - (mean < load))
            count[:] = [0] * len(count)
    return biases(model)


@pytest.mark.parametrize(("world", "expert"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_the_update_is_that_of_one_process_on_every_rank(ranks, folder, world, expert):
    reference = expected(folder)
    before = biases(load_model(folder))
    assert all(not torch.equal(new, old) for new, old in zip(reference, before, strict=True))
    for result in ranks(world, train_on_a_rank, folder, expert):
        for mine, theirs in zip(result, reference, strict=True):
            assert mine.dtype == torch.float32
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-8)
    results = ranks(world, train_on_a_rank, folder, expert)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_what_is_busy_falls_and_what_is_idle_rises(folder):
    model = load_model(folder).train()
    bias, sites = ExpertBias(router_sites(model), rate=RATE, grid=Grid.single()), router_sites(model)
    before = biases(model)
    for site in sites:
        site.experts.recorders[0](torch.tensor([[0, 1], [0, -1], [0, 2], [3, 4], [5, 6]]), None)
    bias.step()
    # 9 slots over 8 experts: only expert 0 (3 slots) and the idle expert 7 are off the others' side of the mean.
    towards = torch.tensor([-1.0] + [1.0 if load < 9 / 8 else -1.0 for load in (1, 1, 1, 1, 1, 1, 0)])
    for new, old in zip(biases(model), before, strict=True):
        assert torch.equal(new, old + RATE * towards)
    bias.step()
    for new, old in zip(biases(model), before, strict=True):
        assert torch.equal(new, old + RATE * towards), "a step without a token moved the bias"


def test_it_balances(folder):
    model = load_model(folder).train()
    sites = router_sites(model)
    bias, ids = ExpertBias(sites, rate=RATE, grid=Grid.single()), tokens(0, 0)[0]
    busiest = []
    for _ in range(60):
        for site in sites:
            site.experts.statistics.reset()
        model(ids)
        busiest.append([site.experts.statistics.counts_E.max().item() for site in sites])
        bias.step()
    mean = ids.numel() * 2 / 8
    for first, last in zip(busiest[0], busiest[-1], strict=True):
        assert last < first
        assert last < 1.6 * mean


@pytest.mark.parametrize("why", ["eval", "skipped", "frozen"])
def test_it_stays_where_it_must(folder, why):
    model = load_model(folder).train(why != "eval")
    for site in router_sites(model):
        site.router.requires_grad_(why != "frozen")
    bias = ExpertBias(router_sites(model), rate=RATE, grid=Grid.single())
    before = biases(model)
    forward(model, *tokens(0, 0))
    if why == "skipped":
        bias.discard()
    bias.step()
    assert all(torch.equal(new, old) for new, old in zip(biases(model), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_saved_and_loaded_with_the_model(folder, tmp_path, dtype):
    model = load_model(folder, dtype=dtype).train()
    bias = ExpertBias(router_sites(model), rate=1e-3, grid=Grid.single())
    forward(model, *tokens(0, 0))
    bias.step()
    changed = biases(model)
    held = [value for name, value in model.state_dict().items() if name.endswith("e_score_correction_bias")]
    export_model(model, tmp_path / "export")
    for now, kept, again in zip(changed, held, biases(load_model(tmp_path / "export")), strict=True):
        assert torch.equal(kept, now)
        assert torch.equal(again, now)
        assert again.dtype == torch.float32


def test_a_family_without_such_a_bias_is_refused(tmp_path):
    model = load_model(make_folder("qwen3_moe", tmp_path / "model"))
    with pytest.raises(UserError, match="no balancing bias"):
        ExpertBias(router_sites(model), rate=RATE, grid=Grid.single())
