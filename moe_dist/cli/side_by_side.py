"""What the verbs share that train several experts in one launch: `nexus branch` and `self-moe specialise`."""

import argparse
from collections.abc import Callable

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration of the experts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: the number of ranks to suppose")


def run(args: argparse.Namespace, *, load: Callable, train: Callable) -> int:
    """load: (file, overrides) -> the plan; train: the plan -> exit code."""
    if args.ranks is not None and not (args.dry_run and args.ranks > 0):
        raise UserError("--ranks is for --dry-run, and at least 1: the launcher decides how many ranks there are")
    ranks = environment.apply(local_rank=args.local_rank)
    plan = load(args.config, args.overrides)
    if not args.dry_run:
        return train(plan)
    if ranks.rank == 0:
        from moe_dist.train.side_by_side.run import describe

        print(describe(plan, args.ranks or ranks.world_size))
    return EXIT_OK
