"""Train a model as CONFIG.yaml says, with key=value overrides. The same command again resumes.

examples:
  moe-dist train configs/debug/tiny.yaml
  moe-dist train configs/debug/tiny.yaml train.steps=20 train.precision=fp32
  moe-dist train configs/debug/tiny.yaml --dry-run --ranks 8 parallel.expert=4
  deepspeed --num_gpus 2 --module moe_dist train configs/debug/tiny.yaml parallel.expert=2 parallel.zero_stage=2
"""

import argparse

from moe_dist.config.checks import check_layout, check_world, smallest_world
from moe_dist.config.keys import all_keys
from moe_dist.config.load import load
from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="configuration of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")
    add_resume_arguments(parser)
    parser.add_argument(
        "--allow-config-drift",
        action="append",
        default=[],
        metavar="KEY",
        help="a key in which the run goes on with another value than before, as train.lr; may be repeated",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: the number of ranks to suppose")
    parser.add_argument("--help-keys", action="store_true", help="list every key of a config with its default")


def add_resume_arguments(parser: argparse.ArgumentParser) -> None:
    """--resume, --overwrite and --dry-run, which `train` and `run` share."""
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="auto (default): continue where the run folder is"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove what is in the run folder and start anew")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")


def run(args: argparse.Namespace) -> int:
    if args.help_keys:
        from moe_dist.config.keys import describe_keys

        print(describe_keys())
        return EXIT_OK
    if args.config is None:
        raise UserError("train needs a CONFIG.yaml, as in `moe-dist train configs/debug/tiny.yaml`")
    if args.overwrite and args.resume not in ("auto", "never"):
        raise UserError("--overwrite removes the run folder: it cannot go with --resume PATH")
    if args.ranks is not None and not (args.dry_run and args.ranks > 0):
        raise UserError("--ranks is for --dry-run, and at least 1: the launcher decides how many ranks a run has")
    unknown = [name for name in args.allow_config_drift if name not in all_keys()]
    if unknown:
        raise UserError(f"--allow-config-drift {unknown[0]}: no such key; `moe-dist train --help-keys` lists them")
    config = load(args.config, args.overrides)
    ranks = environment.apply(local_rank=args.local_rank)
    if args.dry_run:
        alone = config.parallel.world_size or smallest_world(config)
        world_size = args.ranks or max(ranks.world_size, alone if ranks.launcher == "none" else 1)
        check_world(config, world_size)
        check_layout(config, world_size)
        if ranks.rank == 0:
            from moe_dist.train.dry_run import describe

            print(describe(config, world_size))
        return EXIT_OK
    check_world(config, ranks.world_size)
    check_layout(config, ranks.world_size)
    from moe_dist.train.loop import train

    options = {"resume": args.resume, "overwrite": args.overwrite, "may_differ": args.allow_config_drift}
    return train(config, **options) or EXIT_OK
