"""Plan the layout of a run without a GPU: memory of a rank, bytes on the wire, an estimate of time, and the best
layouts of a cluster, ranked.

Memory is followed through the model's own code on shapes alone, and agrees with measured runs to a few per cent. Time
is a rough estimate; what it assumes is printed, and every figure can be set.

examples:
  moe-dist plan configs/scale/qwen3-30b-a3b.yaml                       the config's layout, and the best ones
  moe-dist plan configs/debug/tiny.yaml --gpus 64 --gpu h100           another cluster
  moe-dist plan configs/scale/mixtral-8x7b.yaml --no-rank parallel.tensor=4 parallel.zero_stage=2
  moe-dist plan configs/scale/deepseek-v3.yaml --gpu h200 --achieved 0.35 --across-gbps 400
"""

import argparse
from dataclasses import replace

from moe_dist.config.load import load
from moe_dist.errors import EXIT_OK, UserError

MOST_GPUS = 1024
LATENCIES = {"begin_us": "begin", "inside_us": "message_inside", "across_us": "message_across", "launch_us": "launch"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks; parallel.world_size of the config when absent")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="a100, h100 (default), h200 or b200")
    parser.add_argument("--node-size", type=int, metavar="N", help="GPUs that share a node (8, or parallel.node_size)")
    parser.add_argument("--best", type=int, default=10, metavar="N", help="layouts to show (10)")
    parser.add_argument("--no-rank", action="store_true", help="look at the config's own layout only")
    parser.add_argument(
        "--achieved", type=float, metavar="X", help="part of the peak that matrix products reach (0.45)"
    )
    parser.add_argument("--moved", type=float, metavar="X", help="part of a link's rate that exchanges reach (0.75)")
    parser.add_argument("--usable", type=float, metavar="X", help="part of the memory that tensors may take (0.9)")
    parser.add_argument("--tflops", type=float, metavar="X", help="peak of the GPU in the precision of the config")
    parser.add_argument("--memory-gb", type=float, metavar="X", help="memory of a GPU, in 10^9 bytes")
    parser.add_argument("--inside-gbps", type=float, metavar="X", help="Gbit/s a GPU sends inside a node")
    parser.add_argument("--across-gbps", type=float, metavar="X", help="Gbit/s a GPU sends to other nodes")
    parser.add_argument("--memory-tbps", type=float, metavar="X", help="10^12 bytes/s that a GPU reads from its memory")
    parser.add_argument("--begin-us", type=float, metavar="X", help="microseconds in which an exchange begins (8.4)")
    parser.add_argument("--inside-us", type=float, metavar="X", help="microseconds a partner in the node (3.4)")
    parser.add_argument("--across-us", type=float, metavar="X", help="microseconds a partner on other nodes (14)")
    parser.add_argument("--launch-us", type=float, metavar="X", help="microseconds of the host a kernel (6)")


def run(args: argparse.Namespace) -> int:
    config = load(args.config, args.overrides)
    if config.model.path is not None and not _is_local(config.model.path):
        raise UserError(
            f"model.path={config.model.path}: a plan needs the model's config.json; download it, or give model.config"
        )
    gpus = args.gpus or config.parallel.world_size or 1
    if not 1 <= gpus <= MOST_GPUS:
        raise UserError(f"--gpus {gpus}: plans are made for 1 to {MOST_GPUS} GPUs")
    from moe_dist.planner.report import plan

    print(plan(config, _cluster(args, config, gpus), wanted=0 if args.no_rank else args.best))
    return EXIT_OK


def _is_local(path: str) -> bool:
    from moe_dist.config.checks import is_local

    return is_local(path)


def _cluster(args: argparse.Namespace, config, gpus: int):
    from moe_dist.planner.hardware import Cluster, gpu_named

    gpu = gpu_named(args.gpu)
    figures = ("tflops", "memory_gb", "memory_tbps", "inside_gbps", "across_gbps", "achieved", "moved", "usable")
    for name in (*figures, *LATENCIES):
        value = getattr(args, name)
        shown = f"--{name.replace('_', '-')}"
        if value is not None and name in LATENCIES and not value >= 0:
            raise UserError(f"{shown} {value}: has to be at least 0")
        if value is not None and name not in LATENCIES and not value > 0:
            raise UserError(f"{shown} {value}: has to be above 0")
        if name in ("achieved", "moved", "usable") and value is not None and value > 1:
            raise UserError(f"{shown} {value}: is a part of the whole, at most 1")
    if args.tflops is not None:
        gpu = replace(gpu, **{config.train.precision: args.tflops * 1e12})
    if args.memory_gb is not None:
        gpu = replace(gpu, memory=int(args.memory_gb * 1e9))
    if args.inside_gbps is not None:
        gpu = replace(gpu, inside=args.inside_gbps / 8 * 1e9)
    if args.across_gbps is not None:
        gpu = replace(gpu, across=args.across_gbps / 8 * 1e9)
    if args.memory_tbps is not None:
        gpu = replace(gpu, memory_rate=args.memory_tbps * 1e12)
    node_size = args.node_size or config.parallel.node_size or 8
    if node_size < 1:
        raise UserError(f"--node-size {node_size}: has to be at least 1")
    given = {name: getattr(args, name) for name in ("achieved", "moved", "usable") if getattr(args, name) is not None}
    given |= {field: getattr(args, name) / 1e6 for name, field in LATENCIES.items() if getattr(args, name) is not None}
    return Cluster(gpu, gpus, node_size, **given)
