"""Each balance loss, dealt over ranks, against a plain single process written here: values and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from moe_dist.errors import UserError
from moe_dist.moe import balance
from moe_dist.moe.balance import RealTokens, RouterOutput, StepLoad
from moe_dist.parallel.collectives import sum_over
from moe_dist.parallel.grid import Grid, build_grid
from tests.reference import relative_error

LAYERS, EXPERTS, TOP_K, LENGTH = 3, 6, 2, 8
FORMS = ["hf", "layer_micro", "layer_sequence", "layer_global", "z_loss"]


@dataclass(frozen=True)
class Case:
    """rows[m][r]: sequences that rank r sees in micro-batch m (uneven, zero allowed)."""

    rows: tuple[tuple[int, ...], ...] = ((2, 3, 0, 1),)
    padding: str = "some"  # "none", "some", "a rank", "all"
    documents: bool = False
    score: str = "softmax"
    dtype: torch.dtype = torch.float64


def deal(case: Case, micro: int, world: int) -> list[range]:
    """Sequences of each of `world` ranks in one micro-batch; a smaller world takes neighbouring ranks together."""
    rows, per, parts, start = case.rows[micro], len(case.rows[micro]) // world, [], 0
    for rank in range(world):
        count = sum(rows[rank * per : (rank + 1) * per])
        parts.append(range(start, start + count))
        start += count
    return parts


def problem(case: Case, micro: int) -> dict:
    """One micro-batch of all ranks: logits [layers, B, L, E], ids [layers, B, L, K], mask and positions [B, L]."""
    generator = torch.Generator().manual_seed(11 + micro)
    batch = sum(case.rows[micro])
    logits = 2 * torch.randn(LAYERS, batch, LENGTH, EXPERTS, generator=generator, dtype=torch.float64).to(case.dtype)
    ids = torch.rand(LAYERS, batch, LENGTH, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    mask = torch.ones(batch, LENGTH, dtype=torch.long)
    if case.padding == "some":
        mask[:, 3:] = torch.rand(batch, LENGTH - 3, generator=generator) > 0.5
        mask[:1, :3] = 0
    elif case.padding == "a rank":
        mask[list(deal(case, micro, 4)[1])] = 0
    elif case.padding == "all":
        mask[:] = 0
    positions = torch.arange(LENGTH).repeat(batch, 1)
    if case.documents:
        positions[:, 2:] -= 2
    return {"logits": logits, "ids": ids, "mask": mask, "positions": positions}


my_grid = cache(build_grid)  # setting up the groups costs more than a test


def shares_on_a_rank(case: Case, form: str, axes: dict[str, int] | None = None) -> list[dict]:
    """This rank's share of every micro-batch and the gradient at its logits. axes: sizes over which rows are cut."""
    grid = my_grid(**(axes or {}))
    step, results = StepLoad(), []
    for micro in range(len(case.rows)):
        data, mine = problem(case, micro), list(deal(case, micro, grid.data)[grid.data_rank])
        length = LENGTH // grid.slices
        places = slice(grid.slice_rank * length, (grid.slice_rank + 1) * length)
        logits = data["logits"][:, mine, places].flatten(1, 2).requires_grad_()
        ids = data["ids"][:, mine, places].flatten(1, 2)
        layers = [RouterOutput(*pair, score=case.score) for pair in zip(logits, ids, strict=True)]
        positions = data["positions"][mine] if case.documents else None
        tokens = RealTokens.count(data["mask"][mine], grid, position_ids_BL=positions)
        if form == "layer_global":
            share = balance.layer_global(layers, tokens, grid, step)
        elif form == "z_loss":
            share = balance.z_loss(layers, tokens)
        else:
            share = getattr(balance, form)(layers, tokens, grid)
        share.backward()
        shape = (LAYERS, len(mine), length, EXPERTS)
        results.append({"share": share.detach(), "grad": logits.grad.view(shape)})
    return results


def scores(logits: torch.Tensor, score: str) -> torch.Tensor:
    """Probabilities, from the definition."""
    raw = logits.sigmoid() if score == "sigmoid" else logits.exp()
    return raw / raw.sum(-1, keepdim=True)


def switch(probs: torch.Tensor, ids: torch.Tensor, load_ids: torch.Tensor | None = None) -> torch.Tensor:
    """E Σ f_i P_i of a set of tokens, one by one; f may come from other tokens' ids."""
    load_ids = ids if load_ids is None else load_ids
    if len(probs) == 0:
        return torch.zeros((), dtype=probs.dtype)
    loss = 0.0
    for expert in range(EXPERTS):
        f = (load_ids == expert).sum().item() / load_ids.numel()
        loss = loss + EXPERTS * f * probs[:, expert].mean()
    return loss


def reference(case: Case, form: str, micro: int, logits: torch.Tensor, world: int) -> torch.Tensor:
    """The loss of a micro-batch as one process with all ranks' tokens computes it."""
    data = problem(case, micro)
    mask, ids = data["mask"].bool(), data["ids"]
    if form == "hf":
        rows = torch.cat([logits[layer][mask] for layer in range(LAYERS)])
        chosen = rows.topk(TOP_K, dim=-1).indices
        return TOP_K * switch(rows.softmax(-1), chosen)
    loss = 0.0
    for layer in range(LAYERS):
        if form == "z_loss":
            z = logits[layer][mask].logsumexp(-1) ** 2
            loss = loss + (z.mean() if len(z) else 0.0)
            continue
        probs = scores(logits[layer], case.score)
        if form == "layer_global":
            so_far = []
            for earlier in range(micro + 1):
                other = problem(case, earlier)
                so_far.append(other["ids"][layer][other["mask"].bool()])
            loss = loss + switch(probs[mask], ids[layer][mask], torch.cat(so_far))
        elif form == "layer_micro":
            for part in deal(case, micro, world):
                of_rank = torch.zeros_like(mask)
                of_rank[list(part)] = True
                loss = loss + switch(probs[mask & of_rank], ids[layer][mask & of_rank]) / world
        else:
            pieces = []
            for row in range(len(mask)):
                for places in (range(2), range(2, LENGTH)) if case.documents else (range(LENGTH),):
                    places = [place for place in places if mask[row, place]]
                    if places:
                        pieces.append(switch(probs[row, places], ids[layer][row, places]))
            loss = loss + (sum(pieces) / len(pieces) if pieces else 0.0)
    return loss


def compare(case: Case, form: str, world: int, results: list, tolerance: float, slices: int = 1) -> None:
    for micro in range(len(case.rows)):
        logits = problem(case, micro)["logits"].double().requires_grad_()
        expected = (
            reference(case, form, micro, logits, world // slices) + 0.0 * logits.sum()
        )  # a graph, also without tokens
        expected.backward()
        got = sum(result[micro]["share"] for result in results)
        assert got.item() == pytest.approx(expected.item(), rel=tolerance, abs=0)
        parts = [result[micro]["grad"] for result in results]
        rows = [torch.cat(parts[first : first + slices], dim=2) for first in range(0, world, slices)]
        assert relative_error(torch.cat(rows, dim=1), logits.grad) < tolerance


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("padding", ["none", "some", "a rank", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_shares_sum_to_the_loss_of_one_process(ranks, form, padding, world):
    case = Case(padding=padding)
    compare(case, form, world, ranks(world, shares_on_a_rank, case, form), 1e-12)


@pytest.mark.parametrize("axes", [{"sequence": 2}, {"tensor": 2}, {"sequence": 2, "tensor": 2}])
@pytest.mark.parametrize("form", FORMS)
def test_rows_cut_over_ranks(ranks, form, axes):
    """Documents begin in one slice and end in another; of four ranks two are data ranks, or all share the rows."""
    case = Case(rows=((2, 3, 0, 1), (1, 1, 1, 1)), padding="some", documents=form == "layer_sequence")
    results = ranks(4, shares_on_a_rank, case, form, axes)
    compare(case, form, 4, results, 1e-12, slices=axes.get("sequence", 1) * axes.get("tensor", 1))


def hf_of_a_stage(case: Case) -> dict:
    """This rank's part of `hf` where the first of two stages has one layer of three."""
    grid = my_grid(pipeline=2)
    data, mine = problem(case, 0), list(deal(case, 0, grid.data)[grid.data_rank])
    logits = data["logits"][:, mine].flatten(1, 2).requires_grad_()
    ids = data["ids"][:, mine].flatten(1, 2)
    here = slice(0, 1) if grid.is_first_stage else slice(1, LAYERS)
    layers = [RouterOutput(*pair) for pair in zip(logits[here], ids[here], strict=True)]
    tokens = RealTokens.count(data["mask"][mine], grid)
    parts = balance.hf_parts(layers, tokens, grid, routers=LAYERS)
    share = parts.share(sum_over(parts.load_E, grid.pipeline_group))
    share.backward()
    return {"share": share.detach(), "grad": logits.grad.view(LAYERS, len(mine), LENGTH, EXPERTS)}


def test_hf_over_pipeline_stages(ranks):
    case = Case()
    results = ranks(4, hf_of_a_stage, case)
    logits = problem(case, 0)["logits"].double().requires_grad_()
    expected = reference(case, "hf", 0, logits, 2)
    expected.backward()
    assert sum(result["share"] for result in results).item() == pytest.approx(expected.item(), rel=1e-12)
    first, last = (torch.cat([result["grad"] for result in stage], dim=1) for stage in (results[:2], results[2:]))
    assert relative_error(first + last, logits.grad) < 1e-12
    assert not first[1:].any()


@pytest.mark.parametrize("form", ["layer_micro", "layer_sequence", "layer_global"])
def test_sigmoid_scores(ranks, form):
    case = Case(score="sigmoid")
    compare(case, form, 2, ranks(2, shares_on_a_rank, case, form), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_float32(ranks, form):
    case = Case(dtype=torch.float32)
    compare(case, form, 2, ranks(2, shares_on_a_rank, case, form), 2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_accumulation_over_micro_batches(ranks, form):
    case = Case(rows=((2, 3, 0, 1), (0, 0, 2, 0), (1, 1, 1, 1)))
    compare(case, form, 2, ranks(2, shares_on_a_rank, case, form), 1e-12)


def test_a_sequence_is_a_document_where_positions_say_so(ranks):
    case = Case(documents=True)
    compare(case, "layer_sequence", 2, ranks(2, shares_on_a_rank, case, "layer_sequence"), 1e-12)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("padding", ["none", "some"])
def test_hf_is_transformers_own_function(ranks, padding, world):
    # Imported here, so that the ranks, which import this file, need not wait for transformers.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    case = Case(padding=padding)
    results = ranks(world, shares_on_a_rank, case, "hf")
    data = problem(case, 0)
    logits = data["logits"].clone().requires_grad_()
    mask = None if padding == "none" else data["mask"]
    expected = load_balancing_loss_func(tuple(logits.flatten(1, 2)), EXPERTS, TOP_K, mask)
    expected.backward()
    assert sum(r[0]["share"] for r in results).item() == pytest.approx(expected.item(), rel=1e-6)
    # transformers sums in float32 whatever it is given.
    assert relative_error(torch.cat([r[0]["grad"] for r in results], dim=1), logits.grad) < 1e-6


def one_process(form: str, logits_TE, ids_TK, *, score="softmax", mask_BL=None, positions_BL=None) -> torch.Tensor:
    grid = Grid.single()
    mask_BL = torch.ones(1, len(logits_TE)) if mask_BL is None else mask_BL
    tokens = RealTokens.count(mask_BL, grid, position_ids_BL=positions_BL)
    layers = [RouterOutput(logits_TE, ids_TK, score=score)]
    if form == "layer_global":
        return balance.layer_global(layers, tokens, grid, StepLoad())
    if form == "z_loss":
        return balance.z_loss(layers, tokens)
    return getattr(balance, form)(layers, tokens, grid)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shift", [-300.0, -90.0, 0.0, 90.0])
def test_a_balanced_load_costs_one_and_no_shift_of_the_logits_lowers_it(score, shift):
    # Scores driven towards zero must not shrink the loss, which an epsilon in the normalisation would allow.
    ids = torch.arange(24).view(12, 2) % EXPERTS
    logits = (torch.randn(12, EXPERTS, generator=torch.Generator().manual_seed(3)) + shift).requires_grad_()
    for form in ("layer_micro", "layer_sequence", "layer_global"):
        loss = one_process(form, logits, ids, score=score)
        assert loss.item() == pytest.approx(1.0, rel=1e-5)
        (grad,) = torch.autograd.grad(loss, logits)
        assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_choosing_the_most_probable_experts_never_costs_less_than_balance(score):
    generator = torch.Generator().manual_seed(5)
    for scale in (0.1, 1.0, 10.0):
        logits_TE = scale * torch.randn(1, EXPERTS, generator=generator).repeat(8, 1)
        ids = logits_TE.topk(TOP_K).indices
        assert one_process("layer_global", logits_TE, ids, score=score) >= 1.0
        assert one_process("hf", logits_TE, ids) >= TOP_K


@pytest.mark.parametrize("form", FORMS)
def test_packing_and_padding_change_nothing(form):
    """Two documents in one row, or each in a padded row of its own: one loss, one gradient for each token."""
    generator = torch.Generator().manual_seed(2)
    packed = torch.randn(8, EXPERTS, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.rand(8, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    loss = one_process(form, packed, ids, mask_BL=torch.ones(1, 8), positions_BL=positions)
    (grad,) = torch.autograd.grad(loss, packed)

    place = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9])
    padded = torch.full((10, EXPERTS), torch.nan, dtype=torch.float64)  # as attention without a key may leave them
    padded[place] = packed.detach()
    padded.requires_grad_()
    padded_ids = torch.zeros(10, TOP_K, dtype=torch.long)
    padded_ids[place] = ids
    mask = torch.zeros(10)
    mask[place] = 1
    other = one_process(form, padded, padded_ids, mask_BL=mask.view(2, 5), positions_BL=torch.arange(5).repeat(2, 1))
    (other_grad,) = torch.autograd.grad(other, padded)
    assert other.item() == pytest.approx(loss.item(), rel=1e-12)
    assert relative_error(other_grad[place], grad) < 1e-12
    assert not other_grad[[3, 4]].any()


@pytest.mark.parametrize("form", FORMS)
def test_no_token_at_all_is_an_exact_zero(form):
    logits = torch.zeros(0, EXPERTS, requires_grad=True)
    mask = torch.ones(0, LENGTH)
    loss = one_process(form, logits, torch.zeros(0, TOP_K, dtype=torch.long), mask_BL=mask)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.shape == (0, EXPERTS)


def test_bfloat16_logits_are_computed_with_in_float32():
    logits = torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = logits.topk(TOP_K).indices
    for form in FORMS:
        loss = one_process(form, logits, ids)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(one_process(form, logits.float(), ids).item(), rel=1e-6)


def test_dropped_slots_are_no_load():
    ids = torch.tensor([[0, 1], [2, -1]])
    assert balance.count_slots(ids, 4).tolist() == [1, 1, 1, 0]


def test_an_unknown_score_is_refused_where_it_matters():
    layer = RouterOutput(torch.zeros(4, EXPERTS), torch.zeros(4, 1, dtype=torch.long), score=None, name="model.gate")
    grid = Grid.single()
    tokens = RealTokens.count(torch.ones(1, 4), grid)
    assert balance.hf([layer], tokens, grid).item() == pytest.approx(1.0)
    with pytest.raises(UserError, match=r"model\.gate.*not described"):
        balance.layer_micro([layer], tokens, grid)
    assert replace(layer, score="softmax").num_experts == EXPERTS
