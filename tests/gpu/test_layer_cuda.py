"""The MoE layer and the engine on a GPU against the CPU: outputs, every gradient, and the weights after some steps."""

from __future__ import annotations

import pytest
import torch

from moe_dist.moe.experts import ExpertSpec
from moe_dist.moe.layer import MoEExperts
from moe_dist.moe.placement import contiguous
from moe_dist.parallel.grid import Grid
from moe_dist.train.engine import build_engine
from tests.reference import relative_error
from tests.train import toy

TOKENS, EXPERTS, TOP, HIDDEN, WIDTH = 96, 7, 3, 64, 48
# Sums of at most a few hundred products. In fp32 (unit roundoff 6e-8) two orders of summation differ by about
# sqrt(300) roundoffs in norm, 1e-6. In bf16 each of these tensors is 6.5e-3 from its fp32 value (measured on the CPU);
# two computations in bf16 that round independently are at most sqrt(2) times as far from each other.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def layer_results(device: str, dtype: torch.dtype, *, bias: bool, recompute: bool) -> dict[str, torch.Tensor]:
    """Output and gradients of one layer on `device`; experts 0, 2, 3 and 6 train, experts 3 and 4 get no token."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    placement = contiguous(EXPERTS, ranks=1, trainable=(0, 2, 3, 6))
    spec = ExpertSpec(EXPERTS, HIDDEN, WIDTH, bias=bias)
    layer = MoEExperts(spec, placement, Grid.single(device), dtype=dtype, device=device)
    layer.recompute = recompute
    layer.token_mask_T = (torch.arange(TOKENS) % 5 != 0).to(device)
    with torch.no_grad():
        for _, parameter, _ in layer.expert_parameters():
            parameter.copy_(0.2 * normal(*parameter.shape))
    allowed = torch.tensor([expert for expert in range(EXPERTS) if expert not in (3, 4)])
    picks = torch.rand(TOKENS, len(allowed), generator=generator).argsort(1)[:, :TOP]
    x = normal(TOKENS, HIDDEN).requires_grad_()
    probs = torch.rand(TOKENS, TOP, generator=generator).to(device).requires_grad_()
    y = layer(x, allowed[picks].to(device), probs)
    y.backward(normal(TOKENS, HIDDEN))
    found = {"y": y, "x": x.grad, "probs": probs.grad, "counts": layer.statistics.counts_E}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is None for parameter in layer.frozen.parameters())
    assert all(tensor.device.type == device for tensor in found.values())
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_layer(dtype, bias, recompute):
    ours = layer_results("cuda", dtype, bias=bias, recompute=recompute)
    theirs = layer_results("cpu", dtype, bias=bias, recompute=recompute)
    assert torch.equal(ours.pop("counts"), theirs.pop("counts"))
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        assert relative_error(ours[name], expected) < TOLERANCE[dtype], name


def engine_results(device: str, precision: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Norms of three steps and the weights after them; the second step is skipped, as a gradient is not finite."""
    grid = Grid.single(device)
    model = toy.parallel_model(toy.full_weights(), Grid.single(), [[0, 2, 5], [1]])
    engine = build_engine(
        model,
        grid,
        precision=precision,
        clip_norm=0.5,
        accumulation_steps=2,
        weight_decay=0.1,
        eps=1e-6,
        backend="plain",
    )
    norms = []
    for number, row in enumerate(toy.batches(3, 2)):
        for ids_T, labels_T in row:
            loss = toy.loss_sum(engine.forward(ids_T=ids_T.to(device)), labels_T.to(device)) / toy.label_count(row)
            engine.backward(loss * (float("nan") if number == 1 else 1.0))
        result = engine.step(1e-2)
        assert result.skipped == (number == 1)
        norms.append(result.grad_norm)
    assert engine.adam_step == 2
    weights = {f"{f.name}[{f.expert}]": f.tensor.cpu() for f in engine.fragments("weights")}
    engine.close()
    return norms, weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engine(precision):
    norms, weights = engine_results("cuda", precision)
    expected_norms, expected = engine_results("cpu", precision)
    # AdamW divides a gradient by its own size, so an element whose gradient is all rounding moves by the whole rate:
    # after two steps of 1e-2 the CPU's weights in bf16 are 5e-2 from its weights in fp32.
    norm_tolerance, weight_tolerance = (1e-5, 5e-5) if precision == "fp32" else (2e-2, 7e-2)
    for ours, theirs in ((norms[0], expected_norms[0]), (norms[2], expected_norms[2])):
        assert ours == pytest.approx(theirs, rel=norm_tolerance)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(weights[name], tensor) < weight_tolerance, name
