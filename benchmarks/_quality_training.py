"""Training and measuring small models on bytes: what the experiments on quality have in common."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from benchmarks._quality_text import Domain, windows
from moe_dist.config.schema import MoeSection
from moe_dist.data.attention import model_inputs
from moe_dist.parallel.grid import Grid
from moe_dist.train.engine import build_engine
from moe_dist.train.evaluate import held_out
from moe_dist.train.losses import count_labels, label_loss_sum
from moe_dist.train.routing import Routing
from moe_dist.train.rows import rank_rows


def train(
    model: nn.Module,
    rows: Iterator[torch.Tensor],
    *,
    steps: int,
    rate: Callable[[int], float],
    weight_decay: float,
    moe: MoeSection | None = None,
    measure: Callable[[], dict] | None = None,
    measured_at: Iterable[int] = (),
) -> dict:
    """Train on `steps` batches of windows: {"trace": {steps done: what `measure` gave}, "seconds": without that}."""
    grid, moe = Grid.single(), moe or MoeSection()
    engine = build_engine(model, grid, backend="plain", weight_decay=weight_decay, clip_norm=1.0)
    routing = Routing(model, moe, grid)
    trace, seconds = {}, 0.0
    if 0 in measured_at:
        trace["0"] = measure()
    for step, rows_BL in enumerate(itertools.islice(rows, steps)):
        start = time.perf_counter()
        batch = as_batch(rows_BL)
        routing.start_step()
        with routing.listening():
            loss = label_loss_sum(forward(engine.module, batch), batch["labels"])
        engine.backward(loss / count_labels(batch["labels"]) + routing.loss_share(rank_rows(batch, grid)))
        result = engine.step(rate(step))
        assert not result.skipped, f"step {step}: a loss or a gradient is not finite"
        routing.end_step(skipped=False)
        seconds += time.perf_counter() - start
        if step + 1 in measured_at:
            trace[str(step + 1)] = measure()
    engine.close()
    return {"trace": trace, "seconds": round(seconds, 1)}


def losses_on(model: nn.Module, rows: dict[str, torch.Tensor], batch: int) -> dict[str, dict]:
    """`moe_dist.train.evaluate.held_out` of each set of held-out windows `[N,L]`: nats per byte under "loss"."""
    found = {}
    for name, rows_BL in rows.items():
        batches = (as_batch(part_BL) for part_BL in rows_BL.split(batch))
        found[name] = held_out(lambda batches: _losses(model, batches), model, batches, Grid.single())
    return found


def _losses(model: nn.Module, batches: Iterable[dict]) -> Iterator[torch.Tensor]:
    return (label_loss_sum(forward(model, batch), batch["labels"]) for batch in batches)


def drawn(domains: Sequence[Domain], *, batch: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of windows `[B,L]` of training text without end; each window's domain, then its place, drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        domain_B = torch.randint(len(domains), (batch,), generator=generator)
        place_B = torch.rand(batch, generator=generator, dtype=torch.float64)
        parts = []
        for domain, place in zip(domain_B.tolist(), place_B, strict=True):
            stream_N = domains[domain].train
            start = (place * (len(stream_N) - length + 1)).long()
            parts.append(windows(stream_N, start[None], length))
        yield torch.cat(parts)


def forward(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(**model_inputs(batch, model.config, dtype=torch.float32)).logits


def as_batch(rows_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    position_ids = torch.arange(rows_BL.shape[1]).expand_as(rows_BL)
    return {
        "input_ids": rows_BL,
        "labels": rows_BL,
        "attention_mask": torch.ones_like(rows_BL),
        "position_ids": position_ids,
    }


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (of the sample; nan for one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def shown(values: Sequence[float], *, digits: int = 3) -> str:
    """Mean ± standard deviation over seeds, in words of a table."""
    mean, sd = spread(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:.{digits}f}")


def verdict(differences: Sequence[float], *, what: str = "seeds") -> str:
    """What became of the claim that these differences, one each of `what`, are below zero."""
    right = sum(difference < 0 for difference in differences)
    said = "holds" if right == len(differences) else "**does not hold**" if right == 0 else "**undecided**"
    return f"{said} ({right} of {len(differences)} {what}, {shown(differences)})"
