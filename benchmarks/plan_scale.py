"""Plans for published configurations: our layouts beside those that were published for the same clusters.

    python -m benchmarks.plan_scale [--json FILE] > benchmarks/results/plan.md

Of each configuration in configs/scale the text of `moe-dist plan`, whose first part is the published layout as the
config has it, and a table that puts the published speed beside the estimates. Nothing here was measured by us: the
published figures are NVIDIA's and DeepSeek's, from runs that interleave stages, overlap exchanges, and in part compute
in FP8; ours is the estimate that `moe-dist plan` prints, with nothing overlapped and everything in bf16. The table says
how far the two are apart.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks._harness import row
from moe_dist.config.load import load
from moe_dist.planner.hardware import GPUS, Cluster
from moe_dist.planner.render import describe, render
from moe_dist.planner.search import evaluate, layout_of, rank
from moe_dist.planner.study import Study

CONFIGS = Path(__file__).parents[1] / "configs" / "scale"


@dataclass(frozen=True)
class Published:
    """layout: as its source gives it. rate: tokens a second and GPU."""

    config: str
    layout: str
    rate: float
    source: str


PUBLISHED = (
    Published(
        "mixtral-8x7b",
        "64 H100: TP 1, EP 8, PP 4, VP 8, MBS 1, GBS 256, sequences of 4096, bf16",
        # 6 operations for each of 12.75 G weights that a token meets, and 12 · 32 layers · 4096 · 4096 of attention,
        # which Megatron counts whole.
        468e12 / (6 * 12.75e9 + 12 * 32 * 4096 * 4096),
        "Megatron-LM, megatron/core/transformer/moe/README.md, reference best parallel mapping (MCore 0.8); speed: "
        "from the 468 TFLOP/s given there for Mixtral 8x7B in bf16 (MCore 0.9), without its GPUs and layout",
    ),
    Published(
        "qwen3-30b-a3b",
        "16 H100: TP 1, PP 2, VP 24, EP 8, MBS 2, GBS 512, sequences of 4096, FP8",
        5275,
        "Megatron-Bridge, docs/performance-summary.md, 25.11, DGX-H100",
    ),
    Published(
        "deepseek-v3",
        "1,024 H100: TP 2, PP 8, VP 4, EP 64, MBS 1, GBS 8192, sequences of 4096",
        1297,
        "Megatron-Bridge, performance summary, DGX-H100",
    ),
    Published(
        "deepseek-v3",
        "2,048 H800: PP 16, EP 64, ZeRO 1, no TP, GBS 15,360, sequences of 4096, FP8",
        14.8e12 / 2.664e6 / 3600,
        "DeepSeek-V3 technical report (arXiv 2412.19437), sections 1 and 3.2: 2.664 M GPU hours for 14.8 T tokens",
    ),
)

FRANKLY = """
None of these was run by us, and the ratios show what such an estimate is worth: it is off by a factor of about two, to
either side. It serves to compare layouts of one model on one cluster; no time is to be promised from it. What we take
to be the reasons, none of which we could measure:

- Below the published speed where exchanges count most (DeepSeek-V3: experts over 8 nodes): nothing overlaps in ours,
  stages are not interleaved, and layers are recomputed whole.
- Above it where experts are small and many (Qwen3-30B-A3B), though the published run computes in FP8: products are all
  taken to reach the same part of the peak, rows are moved and activations computed for nothing, and experts are used
  alike. Its micro-batches are of 2 rows, those of our config of 1, and these are recomputed.
- Mixtral's published figure is a rate of operations, turned into tokens by us."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_scale", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write time a token beside the published one there")
    parser.add_argument("--full", action="store_true", help="there is no more than this")
    file, rows = parser.parse_args().json, []
    print("`python -m benchmarks.plan_scale`: estimates, nothing was run on a GPU\n")
    header = ("model", "published layout", "published", "our estimate of it", "ours / published", "our best")
    header += ("its estimate", "source")
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    texts = {}
    for published in PUBLISHED:
        config = load(CONFIGS / f"{published.config}.yaml")
        cluster = Cluster(GPUS["h100"], config.parallel.world_size)
        if published.config not in texts:
            study = Study(config)
            own = evaluate(study, layout_of(config, cluster.gpus), cluster)
            sequences = config.train.global_batch_size
            ranking = rank(study, cluster, sequences=sequences)
            text = render(study, cluster, own, ranking, sequences=sequences)
            tokens = sequences * config.data.seq_len / cluster.gpus
            texts[published.config] = text, own, ranking.best[0], tokens
        _, own, best, tokens = texts[published.config]
        here = "H800" not in published.layout
        cells = (
            published.config,
            published.layout,
            f"{published.rate:,.0f} tokens/s a GPU",
            f"{tokens / own.speed.step:,.0f}, {own.memory.total / 2**30:.1f} GiB" if here else "other cluster",
            f"{tokens / own.speed.step / published.rate:.2f}" if here else "",
            describe(best.layout) if here else "",
            f"{tokens / best.speed.step:,.0f}, {best.memory.total / 2**30:.1f} GiB" if here else "",
            published.source,
        )
        print(f"| {' | '.join(cells)} |", flush=True)
        if here:
            times = 1e6 * own.speed.step / tokens, 1e6 / published.rate
            rows.append(row(f"{published.config}, estimated", *times, "published", unit="us a token and GPU"))
    print(FRANKLY)
    for name, (text, *_) in texts.items():
        print(f"\n## {name}\n\n```\n{text}\n```")
    if file is not None:
        file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
