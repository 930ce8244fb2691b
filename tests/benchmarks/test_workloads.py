"""Each workload has the property that it is named for, and tokens that a router can be made to choose."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from benchmarks._workloads import DATA, WORKLOADS, Layout, logits, real_routing, workload

LAYOUTS = (Layout(4, 16, 3, 32), Layout(2, 8, 1, 16), Layout(3, 7, 2, 14), Layout(4, 64, 8, 32), Layout(1, 8, 2, 8))


def loads(parts: list[torch.Tensor], layout: Layout) -> torch.Tensor:
    return torch.bincount(torch.cat(parts).flatten(), minlength=layout.experts)


def ranks_of(ids_TK: torch.Tensor, layout: Layout) -> torch.Tensor:
    rank_E = torch.tensor([rank for rank, ids in enumerate(layout.held()) for _ in ids])
    return rank_E[ids_TK]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", WORKLOADS)
def test_tokens_have_distinct_experts_and_are_the_same_every_time(name, layout):
    for step in range(3):
        parts = workload(name, layout, step=step)
        assert len(parts) == layout.ranks
        assert sum(map(len, parts)) == layout.ranks * layout.tokens
        for first, again in zip(parts, workload(name, layout, step=step), strict=True):
            assert torch.equal(first, again)
            assert first.dtype == torch.int64
            assert first.shape[1] == layout.top_k
            assert ((first >= 0) & (first < layout.experts)).all()
            assert all(len(set(row)) == layout.top_k for row in first.tolist())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_is_what_its_name_says(layout):
    tokens = layout.ranks * layout.tokens
    made = {name: workload(name, layout) for name in WORKLOADS}
    held = layout.held()
    if tokens % layout.experts == 0:
        assert loads(made["W0 balanced"], layout).unique().tolist() == [tokens * layout.top_k // layout.experts]
    assert loads(made["W1 hot expert"], layout)[layout.experts // 3] == tokens
    on_first = (ranks_of(torch.cat(made["W2 hot rank"]), layout) == 0).sum(dim=1)
    assert on_first.unique().tolist() == [min(layout.top_k, len(held[0]))]
    spread = ranks_of(torch.cat(made["W3 spread"]), layout)
    assert {len(set(row)) for row in spread.tolist()} == {min(layout.top_k, layout.ranks)}
    if layout.ranks > 1:
        counts = [len(part) for part in made["W4 ragged"]]
        assert counts[-1] == 0
        assert all(a >= 2 * b - 1 for a, b in pairwise(counts))
        assert not loads(made["W5 idle rank"], layout)[held[-1]].any()
    hot = [int(loads(workload("W6 rotating", layout, step=step), layout).argmax()) for step in range(3)]
    assert len(set(hot)) == 3
    assert all(loads(workload("W6 rotating", layout, step=s), layout)[e] == tokens for s, e in enumerate(hot))
    burst = loads(workload("W7 burst", layout, step=1), layout)
    assert burst.tolist() == [tokens] * layout.top_k + [0] * (layout.experts - layout.top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_router_chooses_them_with_a_margin(layout, dtype):
    for name in WORKLOADS:
        for ids_TK in workload(name, layout):
            logits_TE = logits(ids_TK, layout.experts).to(dtype)
            values, chosen = logits_TE.float().sort(dim=1, descending=True)
            assert torch.equal(chosen[:, : layout.top_k], ids_TK)
            assert torch.equal(values.diff(dim=1), torch.full_like(values[:, 1:], -0.125))


@pytest.mark.skipif(not (DATA / "intent_routing.npz").is_file(), reason=f"the routing is not in {DATA}")
def test_the_real_routing():
    ids_LTK, gates_LTK = real_routing()
    assert ids_LTK.shape == gates_LTK.shape == (26, 8222, 6)
    assert 0 <= gates_LTK.min() < gates_LTK.max() <= 1
    assert all(len(set(token)) == 6 for token in ids_LTK[0].tolist())
    assert int(ids_LTK.max()) == 63
