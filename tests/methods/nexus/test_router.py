"""The routers against their formulas, one expert at a time, and what must hold of them whatever the weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_dist.models.nexus.configuration_nexus import CONFIGS
from moe_dist.models.nexus.router_nexus import KINDS
from moe_dist.moe import balance
from moe_dist.parallel.grid import Grid
from tests.methods.nexus.tiny import ROUTERS, SIZES
from tests.reference import relative_error

HIDDEN, DIM = SIZES["hidden_size"], 20


def _config(kind: str, **fields):
    dim = {"paper": DIM}.get(kind, HIDDEN)
    return CONFIGS["llama"](**{**SIZES, "num_experts": 4, "router": kind, "domain_dim": dim, **fields})


def _router(kind: str, *, seed: int = 0, **fields):
    router = KINDS[kind](_config(kind, **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(router.state_dict().items()):
            if name not in ("temperature", "input_length"):
                scale = 0.2 if name in ("w1", "w2") else 1.0
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    if kind == "prototype":
        router.input_length.fill_(5.0)
    return router.eval()


def _tokens(count: int = 50, seed: int = 9) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def _reference_rows(router, kind: str) -> torch.Tensor:
    """The rows by the formulas in router_nexus's head, in float64."""
    values = {name: tensor.double() for name, tensor in router.state_dict().items()}
    if kind == "linear":
        return values["weight"]
    rows = []
    for d in values["domain_embeddings"]:
        z = values["w1"] @ d
        e = values["w2"] @ (z[:HIDDEN] / (1 + torch.exp(-z[:HIDDEN])) * z[HIDDEN:])
        if kind == "prototype":
            mu = values["input_mean"]
            e = d + e
            e = e - mu * (e @ mu) / (mu @ mu)
            e = values["temperature"] / values["input_length"] * e / e.norm()
        rows.append(e)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", ROUTERS)
def test_forward_follows_the_formula(kind, normalise, top_k):
    router = _router(kind, num_experts_per_tok=top_k, norm_topk_prob=normalise)
    x_TH = _tokens() / 10
    logits_TE, weights_TK, ids_TK = router(x_TH.view(5, 10, HIDDEN))
    rows = _reference_rows(router, kind)
    logits = x_TH.double() @ rows.T
    assert rows.shape == (4, HIDDEN)
    assert relative_error(router.rows(), rows) < 2e-6
    assert relative_error(logits_TE, logits) < 2e-6
    probs = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = probs.sort(dim=1, descending=True)
    assert torch.equal(ids_TK, expected.indices[:, :top_k])
    weights = expected.values[:, :top_k]
    assert relative_error(weights_TK, weights / weights.sum(1, keepdim=True) if normalise else weights) < 2e-6


@pytest.mark.parametrize("kind", ROUTERS)
def test_logits_are_float32_in_a_bfloat16_model(kind):
    router = _router(kind)
    narrow = _router(kind).bfloat16()
    x_TH = _tokens().bfloat16()
    logits_TE, weights_TK, _ = narrow(x_TH)
    assert logits_TE.dtype == weights_TK.dtype == torch.float32
    router.load_state_dict({name: tensor.float() for name, tensor in narrow.state_dict().items()})
    assert torch.equal(logits_TE, router(x_TH.float())[0])


def _appended(router, kind: str, d_M: torch.Tensor):
    """The router with one more domain."""
    bigger = KINDS[kind](_config(kind, num_experts=router.num_experts + 1)).eval()
    state = router.state_dict()
    state["domain_embeddings"] = torch.cat([state["domain_embeddings"], d_M[None]])
    bigger.load_state_dict(state)
    return bigger


@pytest.mark.parametrize("kind", ["paper", "prototype"])
def test_n1_appending_a_domain_leaves_the_others_as_they_are(kind):
    router = _router(kind)
    bigger = _appended(router, kind, 3 * torch.randn(router.domain_embeddings.shape[1]))
    with torch.no_grad():
        assert bigger.rows().shape == (5, HIDDEN)
        assert torch.equal(bigger.rows()[:4], router.rows())
        x_TH = _tokens() / 10
        before, after = router(x_TH)[0], bigger(x_TH)[0]
    assert (after[:, :4] - before).abs().max() < 1e-6
    old, new = before.double().softmax(1), after.double().softmax(1)
    assert torch.allclose(new[:, :4], old * (1 - new[:, 4:]), atol=1e-6)
    kept = new.argmax(1) != 4
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(new.argmax(1)[kept], old.argmax(1)[kept])


def test_n5_parameters_do_not_depend_on_the_number_of_experts():
    for kind, extra in (("paper", 0), ("prototype", 1)):
        dim = DIM if kind == "paper" else HIDDEN
        counts = {
            experts: sum(p.numel() for p in _router(kind, num_experts=experts).parameters()) for experts in (1, 4, 5, 9)
        }
        assert set(counts.values()) == {dim * 2 * HIDDEN + HIDDEN * HIDDEN + extra}
    assert sum(p.numel() for p in _router("linear", num_experts=5).parameters()) == 5 * HIDDEN


@pytest.mark.parametrize("kind", ROUTERS)
def test_n6_the_gate_alone_carries_gradient_to_the_router(kind):
    router = _router(kind).train()
    _, weights_TK, _ = router(_tokens() / 10)
    (weights_TK * torch.randn_like(weights_TK)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name
    # Divided by their sum, a single weight is 1 whatever the router says: nothing to learn from.
    router = _router(kind, norm_topk_prob=True).train()
    (router(_tokens() / 10)[1] * torch.randn(50, 1)).sum().backward()
    assert max(parameter.grad.abs().max() for parameter in router.parameters()) < 1e-6


@pytest.mark.parametrize("kind", ["paper", "prototype"])
def test_n6_equal_domains_are_routed_uniformly(kind):
    router = _router(kind)
    router.domain_embeddings.copy_(router.domain_embeddings[:1].expand_as(router.domain_embeddings))
    logits_TE, weights_TK, _ = router(_tokens())
    assert torch.allclose(logits_TE.softmax(1), torch.full((50, 4), 0.25), atol=1e-6)
    assert torch.allclose(weights_TK, torch.tensor(0.25), atol=1e-6)


def test_prototype_sees_no_common_part_and_no_length():
    router = _router("prototype")
    x_TH = _tokens()
    shifted = x_TH + 7 * router.input_mean
    with torch.no_grad():
        assert torch.allclose(router(x_TH)[0], router(shifted)[0], atol=1e-4)
        assert torch.allclose(router.rows().norm(dim=1), torch.tensor(8.0 / 5.0), atol=1e-6)
        router.input_mean.zero_()
        assert router.rows().isfinite().all()


class _Counted:
    """Counts how often a router computes its rows."""

    def __init__(self, router):
        self.count, fold = 0, router.fold

        def counting():
            self.count += 1
            return fold()

        router.fold = counting


@pytest.mark.parametrize("kind", ROUTERS)
def test_n7_rows_are_kept_at_inference_only(kind):
    router = _router(kind)
    folded = _Counted(router)
    x_TH = _tokens()
    with torch.no_grad():
        first = router.rows()
        router(x_TH), router(x_TH)
        assert folded.count == 1
        assert torch.equal(first, router.fold())
    folded.count = 0
    router(x_TH), router(x_TH)
    router.train()
    with torch.no_grad():
        router(x_TH), router(x_TH)
    assert folded.count == 4


@pytest.mark.parametrize("kind", ROUTERS)
def test_n7_kept_rows_are_forgotten_when_a_weight_may_have_changed(kind):
    router = _router(kind)
    first_parameter = next(router.parameters())

    def stale() -> bool:
        with torch.no_grad():
            return not torch.equal(router.rows(), router.fold())

    def hidden_step():
        """An optimizer whose weights are views that autograd does not know: as ZeRO's are."""
        flat = torch.nn.Parameter(torch.zeros(1))
        flat.grad = torch.ones(1)
        torch.optim.AdamW([flat], lr=0.1).step()
        first_parameter.data = first_parameter.data + 1

    changes = {
        "a step": lambda: torch.optim.SGD(router.parameters(), lr=0.5).step(),
        "a step on other tensors": hidden_step,
        "loading": lambda: router.load_state_dict(_router(kind, seed=3).state_dict()),
        "a write in place": lambda: first_parameter.mul_(2),
        "training in between": lambda: (router.train(), router.eval()),
        "another dtype": lambda: router.double(),
    }
    for name, change in changes.items():
        loss = router(_tokens() / 10)[1].square().sum()
        loss.backward()
        with torch.no_grad():
            router.rows()
            change()
        assert not stale(), name


@pytest.mark.parametrize("kind", ["linear"])
def test_n8_load_balance_loss_of_uniform_and_collapsed_routing(kind):
    router = _router(kind)
    with torch.no_grad():
        router.weight.copy_(2 * torch.eye(4, HIDDEN))

    def loss(x_TH: torch.Tensor) -> float:
        logits_TE, _, ids_TK = router(x_TH)
        mask_BL = torch.ones(1, len(x_TH))
        tokens = balance.RealTokens.count(mask_BL, Grid.single())
        return balance.layer_micro([balance.RouterOutput(logits_TE, ids_TK)], tokens, Grid.single()).item()

    directions = torch.eye(4, HIDDEN)
    assert loss(directions.repeat(3, 1)) == pytest.approx(1.0, abs=1e-6)
    probability = F.softmax(torch.tensor([2.0, 0.0, 0.0, 0.0]), dim=0)[0].item()
    assert loss(directions[:1].repeat(12, 1)) == pytest.approx(4 * probability, abs=1e-6)
