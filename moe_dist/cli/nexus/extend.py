"""Add an expert, a dense model trained on a new domain, to a Nexus model.

The new domain is embedded first, in the space of the old ones (nexus.same_space_as). The new model's MLPs become one
more expert; of everything else but the router it takes the share nexus.merge, 1/(n+1) unless told. No weight of the
router changes; a linear router gets a row as nexus.linear_extend says. With sources in data.train it is then printed
what share of each source's tokens the new expert gets before any step; the source called like the expert is its own.

examples:
  moe-dist nexus embed new.yaml --out new.safetensors nexus.same_space_as=domains.safetensors
  moe-dist nexus extend new.yaml extended nexus.model=upcycled nexus.domains=new.safetensors
"""

import argparse

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="sections nexus (model, experts, domains) and data")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")


def run(args: argparse.Namespace) -> int:
    if environment.apply(local_rank=args.local_rank).world_size > 1:
        raise UserError("nexus extend runs as one plain process")
    from moe_dist.methods.nexus.config import load_config

    config = load_config(args.config, args.overrides)
    from moe_dist.methods.nexus.extend import extend
    from moe_dist.methods.nexus.preview import preview

    seen = []
    receipt = extend(config, args.out, look=lambda folder: seen.append(preview(folder, config)))
    print(receipt.render())
    print(seen[0].render())
    print(f"wrote {args.out}")
    return EXIT_OK
