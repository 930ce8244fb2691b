"""Take an expert out of a Nexus model.

Later experts move up by one. What merging has mixed into attention, norms and embeddings stays there.

example:
  moe-dist nexus remove extended code smaller
"""

import argparse

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a Nexus model")
    parser.add_argument("expert", metavar="EXPERT", help="name of the expert (its number where experts have none)")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")


def run(args: argparse.Namespace) -> int:
    if environment.apply(local_rank=args.local_rank).world_size > 1:
        raise UserError("nexus remove runs as one plain process")
    from moe_dist.methods.nexus.extend import remove

    print(remove(args.model, args.expert, args.out).render())
    print(f"wrote {args.out}")
    return EXIT_OK
