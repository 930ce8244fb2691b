"""Check the ranks, their network and the room for CONFIG.yaml, and train nothing. `train` does the same at its start.

examples:
  moe-dist preflight my.yaml
  torchrun --nproc-per-node 8 -m moe_dist preflight my.yaml parallel.expert=8
  srun --ntasks-per-node=8 python -m moe_dist preflight my.yaml
"""

import argparse

from moe_dist.config.checks import check_layout, check_world
from moe_dist.config.load import load
from moe_dist.errors import EXIT_OK
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")


def run(args: argparse.Namespace) -> int:
    config = load(args.config, [*args.overrides, "launch.preflight=true"])
    ranks = environment.apply(local_rank=args.local_rank)
    check_world(config, ranks.world_size)
    check_layout(config, ranks.world_size)
    from moe_dist.train.ranks import preflight

    preflight(config)
    return EXIT_OK
