"""Which back end computes a layer's experts fastest: forward and backward timed on rows like the layer's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moe_dist.moe.layer import MoEExperts
from moe_dist.ops import grouped_mlp
from moe_dist.ops.grouped_mlp import Span, swiglu

ROUNDS = 5
SECONDS = 8.0  # for all shapes of a model, besides a first and one timed call of each back end


@dataclass(frozen=True)
class Shape:
    """What the time of a layer's experts on a rank depends on.

    trainable, frozen: how many experts of each kind the rank holds. rows: of all of them in a forward.
    """

    trainable: int
    frozen: int
    hidden: int
    inner: int
    width: int
    bias: bool
    swiglu: bool
    recompute: bool
    dtype: str
    device: str
    rows: int


def shape_of(layer: MoEExperts, *, dtype: torch.dtype, rows: int) -> Shape:
    """Of a layer whose rank gets so many rows, and which computes in `dtype`."""
    spec = layer.spec
    return Shape(
        trainable=layer.trainable.held if layer.trainable is not None else 0,
        frozen=layer.frozen.held if layer.frozen is not None else 0,
        hidden=spec.hidden,
        inner=spec.inner,
        width=spec.width,
        bias=spec.bias,
        swiglu=spec.activation is swiglu,
        recompute=layer.recompute,
        dtype=str(dtype).removeprefix("torch."),
        device=layer.grid.device.type,
        rows=rows,
    )


def serving(layer: MoEExperts, shape: Shape) -> list[str]:
    """The back ends that compute such a layer, however its rows are spread."""
    span = _span(shape, layer.grid.device, [1])
    return grouped_mlp.serving(span.w_in, span, layer.spec.activation)


def measure(layers: Mapping[Shape, MoEExperts]) -> dict[Shape, dict[str, float]]:
    """Median milliseconds of forward and backward by each back end that serves, for a layer of each shape.

    Tokens choose experts at random, all of them alike. Weights and rows are made for it and given back, and no random
    state but its own is touched. A shape without experts or rows has no times.
    """
    return {shape: _measure(layer, shape, SECONDS / len(layers)) for shape, layer in layers.items()}


def _measure(layer: MoEExperts, shape: Shape, seconds: float) -> dict[str, float]:
    held = shape.trainable + shape.frozen
    if not held or not shape.rows:
        return {}
    device, activation = layer.grid.device, layer.spec.activation
    seats_R = torch.randint(held, (shape.rows,), generator=torch.Generator().manual_seed(0))
    counts = seats_R.bincount(minlength=held).tolist()
    trained = {True: counts[: shape.trainable], False: counts[shape.trainable :]}
    spans = {trains: _span(shape, device, mine) for trains, mine in trained.items() if mine}
    needs = [trains and tensor is not None for trains, span in spans.items() for tensor in span.tensors()]
    spans = list(spans.values())
    x_RH, grad_RH = (_drawn(shape, device, shape.rows, shape.hidden) for _ in range(2))
    factor_R = torch.ones(shape.rows, device=device)

    def step(backend: str) -> None:
        kept = [not shape.recompute] * len(spans)
        options = {"factor_R": factor_R, "backend": backend}
        _, zs = grouped_mlp.forward(x_RH, spans, activation, keep_z=kept, **options)
        options |= {"needs_rows": True, "needs_factor": True, "needs": needs, "on_rows": lambda dx, dfactor: None}
        grouped_mlp.backward(grad_RH, x_RH, zs, spans, activation, **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    names = [set(grouped_mlp.serving(x_RH, span, activation)) for span in spans]
    serve = [name for name in grouped_mlp.BACKENDS if all(name in those for those in names)]
    return _interleaved({name: lambda name=name: step(name) for name in serve}, seconds)


def _interleaved(steps: Mapping[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each. They take turns, so that a busy machine is busy for all of them alike."""
    for step in steps.values():  # a first call faults pages in, starts threads and generates code
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for turn in range(ROUNDS):
        if turn and time.perf_counter() - start > seconds:
            break
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def _span(shape: Shape, device: torch.device, counts: list[int]) -> Span:
    """Experts of that shape, one for each count."""
    sizes = [(shape.inner, shape.hidden), (shape.hidden, shape.width)]
    sizes += [(shape.inner,), (shape.hidden,)] if shape.bias else []
    # An expert is like another: drawing all of them would take longer than what is measured.
    tensors = [_drawn(shape, device, *size).expand(len(counts), *size).contiguous() for size in sizes]
    return Span(*tensors, *[None] * (4 - len(tensors)), counts, torch.tensor(counts, device=device))


def _drawn(shape: Shape, device: torch.device, *sizes: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*sizes, generator=generator, device=device).to(getattr(torch, shape.dtype))
