"""Write a Nexus model so that plain transformers, and what builds on it, loads it without this package.

--form qwen2_moe folds the router into a plain linear one and writes a stock Qwen2-MoE with the same logits, which
serving engines know. It fits models of Llama, Mistral and Qwen2. --form own puts the modeling code beside the weights;
loading them then needs trust_remote_code=True. Without --form the first is taken where it fits.

examples:
  moe-dist nexus export extended served
  moe-dist nexus export extended shared --form own
"""

import argparse

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a Nexus model")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("--form", choices=("auto", "qwen2_moe", "own"), default="auto", help="what to write (auto)")


def run(args: argparse.Namespace) -> int:
    if environment.apply(local_rank=args.local_rank).world_size > 1:
        raise UserError("nexus export runs as one plain process")
    from moe_dist.methods.nexus.stock import export

    print(export(args.model, args.out, form=args.form).render())
    print(f"wrote {args.out}")
    return EXIT_OK
