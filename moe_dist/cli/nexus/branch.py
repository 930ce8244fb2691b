"""Train the dense experts from the seed, one for each domain. The same command again resumes.

CONFIG.yaml is a configuration as for `moe-dist train`: model.path is the seed, every source of data.train is a domain,
under whose name its expert is trained on it alone; everything else holds for all experts. Only this verb has
  branch.groups=2                             groups of ranks that train side by side, an expert each at a time
  branch.overrides={code: [train.steps=200]}  what is different for one expert
One process trains the experts one after the other. More ranks are cut into as many equal groups as there are experts,
or as divide the ranks; batch sizes and parallel sizes are those of a group. Writes run.dir/DOMAIN, a Hugging Face
folder each, and run.dir/runs/DOMAIN, the run; prints the held-out losses of the seed and of all experts.

examples:
  moe-dist nexus branch configs/nexus/branch.yaml --dry-run --ranks 6
  moe-dist nexus branch configs/nexus/branch.yaml run.dir=experts
  torchrun --nproc-per-node 6 -m moe_dist nexus branch configs/nexus/branch.yaml run.dir=experts
"""

import argparse

from moe_dist.errors import UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration of the experts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: the number of ranks to suppose")


def run(args: argparse.Namespace) -> int:
    if args.ranks is not None and not (args.dry_run and args.ranks > 0):
        raise UserError("--ranks is for --dry-run, and at least 1: the launcher decides how many ranks there are")
    ranks = environment.apply(local_rank=args.local_rank)
    from moe_dist.methods.nexus.branch import branch, describe
    from moe_dist.methods.nexus.branch_config import load_branching

    branching = load_branching(args.config, args.overrides)
    if not args.dry_run:
        return branch(branching)
    if ranks.rank == 0:
        print(describe(branching, args.ranks or ranks.world_size))
    return 0
