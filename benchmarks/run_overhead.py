"""What watching a run costs a training step: agreement about a stop, heartbeat, statistics, watchers, replica checks.

    python -m benchmarks.run_overhead [--json FILE] [--full]

Two gloo ranks train a small Qwen3-MoE-shaped model under expert parallelism. Blocks of steps with all of it and with
none of it take turns; in those with none the watchers are stopped and nothing is counted. Two such steps differ by more
than it costs, so every part is also timed by itself. The watchers are processes of their own: theirs is the time of a
core, by the system's accounting. Goals are rows whose peer is one percent of the step: a ratio of 1 or more meets it.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks._harness import Median, row, run
from benchmarks._ranks import on_ranks
from moe_dist.config.load import build
from moe_dist.launch.guard import guarded
from moe_dist.moe.statistics import LoadStatistics
from moe_dist.parallel.collectives import waited
from moe_dist.parallel.grid import build_grid
from moe_dist.train.agree import agree
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.engine import build_engine
from moe_dist.train.losses import label_loss_sum
from moe_dist.train.replicas import check_replicas
from moe_dist.train.routing import Routing
from moe_dist.train.rows import rank_rows
from moe_dist.train.start import meet
from moe_dist.train.stop import StopFlag

SHARE = 0.01
BLOCK = 4  # steps
TREE = {
    "run": {"name": "overhead", "dir": "overhead"},
    "model": {
        "config": {
            "model_type": "qwen3_moe",
            "vocab_size": 4096,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "moe_intermediate_size": 320,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 512,
        }
    },
    "parallel": {"expert": 2},
    "moe": {"balance_loss": "layer_micro"},
    "train": {"precision": "bf16"},
}


def collect(full: bool) -> Iterator[dict | str]:
    yield from on_ranks(2, measure, 40 if full else 12)


def measure(blocks: int) -> Iterator[dict | str]:
    config = build(TREE)
    grid = build_grid(expert=2)
    plan = plan_model(config, grid)
    model = build_model(config, plan, grid)
    engine = build_engine(model, grid, zero_stage=1, precision="bf16", clip_norm=1.0)
    routing = Routing(model, config.moe, grid)
    ids_BL = torch.randint(4, 4096, (1, 256), generator=torch.Generator().manual_seed(grid.rank))
    batch = {"input_ids": ids_BL, "labels": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
    batch["position_ids"] = torch.arange(256).view(1, -1)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    counting = LoadStatistics.add
    with tempfile.TemporaryDirectory() as folder, StopFlag(Path(folder, "stop") if grid.rank == 0 else None) as stop:
        options = {"rank": grid.rank, "world": 2, "local_rank": grid.rank, "store": meet()}
        with guarded(**options, run_dir=folder, hang_timeout=None) as guard:
            watcher = guard.watcher

            def step(number: int, on: bool) -> None:
                if on:
                    guard.beat("reading a batch", number)
                start = time.perf_counter()
                labels, *_ = agree([batch], on and stop.requested, 0, grid)
                if on:
                    routing.start_step()
                    guard.beat("forward")
                    before = waited()
                rows = rank_rows(batch, grid)
                routing.see(rows.real_BS)
                with routing.listening():
                    loss = label_loss_sum(engine.forward(**inputs).logits, batch["labels"])
                if on:
                    guard.worked(time.perf_counter() - start - (waited() - before))
                    guard.beat("backward")
                engine.backward(loss / labels + routing.loss_share(rows))
                if on:
                    guard.beat("the update")
                engine.step(1e-4)
                if on:
                    routing.end_step(skipped=False)
                    if number % 10 == 0:
                        guard.beat("the log", number)
                        routing.figures()

            def block(number: int, on: bool) -> float:
                LoadStatistics.add = counting if on else lambda *_: None
                os.kill(watcher, signal.SIGCONT if on else signal.SIGSTOP)
                dist.barrier()
                start = time.perf_counter()
                for index in range(BLOCK):
                    step(number * BLOCK + index, on)
                dist.barrier()
                return 1e3 * (time.perf_counter() - start) / BLOCK

            for on in (True, False):
                block(0, on)
            times: dict[bool, list[float]] = {True: [], False: []}
            for number in range(blocks):
                for on in (True, False) if number % 2 == 0 else (False, True):
                    times[on].append(block(number, on))
            LoadStatistics.add = counting
            os.kill(watcher, signal.SIGCONT)
            ours, peer = Median(times[True]), Median(times[False])
            yield row("a step with all of it", ours, peer, "a step with none of it")
            ratios = Median([a / b - 1 for a, b in zip(times[True], times[False], strict=True)])
            yield (
                f"Pair by pair, steps with all of it take {100 * ratios:+.2f} % more than those with none (quartiles "
                f"{100 * ratios.spread[0]:+.2f} to {100 * ratios.spread[1]:+.2f} %)."
            )
            goal = SHARE * float(peer)
            parts = _parts(config, model, grid, guard, stop, routing, step, watcher, float(peer))
            for name, milliseconds in parts.items():
                yield row(name, milliseconds, goal, "1 % of a step")
            yield row("all parts", sum(parts.values()), goal, "1 % of a step")
    engine.close()


def _parts(config, model, grid, guard, stop, routing, step, watcher: int, step_ms: float) -> dict[str, float]:
    """Milliseconds a step of each part, by itself."""

    def timed(work, times: int) -> float:
        work()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(times):
            work()
        return 1e3 * (time.perf_counter() - start) / times

    def beats() -> None:
        for phase in ("reading a batch", "forward", "backward", "the update"):
            guard.beat(phase, 1)
        waited()
        waited()
        guard.worked(0.1)

    counts = [layer.statistics.counts_E.clone() for _, layer in routing.layers]

    def statistics() -> None:
        routing.start_step()
        for (_, layer), counts_E in zip(routing.layers, counts, strict=True):
            layer.statistics.add(counts_E, 0)
        routing.end_step(skipped=False)

    parts = {
        "heartbeat": timed(beats, 2000),
        "asking for a stop (rides along with the labels' all-reduce)": timed(lambda: stop.requested, 2000),
        "statistics of a step": timed(statistics, 500),
        "figures of a log line, each tenth step": timed(routing.figures, 30) / 10,
        "replica check, each 500th step": timed(lambda: check_replicas(model, config, grid, step=0), 5) / 500,
    }
    before, start = _cpu_seconds(watcher), time.perf_counter()
    for _ in range(25):
        step(1, True)
    share = (_cpu_seconds(watcher) - before) / (time.perf_counter() - start)
    parts["the watcher, of one core"] = share * step_ms
    return parts


def _cpu_seconds(pid: int) -> float:
    """Seconds that a process has run so far, as the scheduler counts them: ticks of 10 ms would be too coarse."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


if __name__ == "__main__":
    run("run_overhead", collect, description=__doc__.splitlines()[0])
