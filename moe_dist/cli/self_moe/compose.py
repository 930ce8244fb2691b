"""Make one model of a base and its LoRA experts.

compose.method says what it becomes. Mixtures, whose router `moe-dist train` trains next:
  mixse     each token goes through the top_k experts that a router chooses for it
  joint     the same with new experts (compose.skills, lora), to be trained together with the router
  uniform   every expert at weight 1/n, nothing to train
  random    compose.top_k experts drawn for each token, nothing to train
Merges, which are dense models:
  instance  the one expert that has learned all skills (specialise.instance=true)
  ties      the experts' changes trimmed, by majority of signs, averaged
  dare      the experts' changes thinned out at random, scaled up, summed
OUT is a Hugging Face folder. That of a mixture is its base to plain transformers; experts and router are in OUT/mixse.
A receipt is printed and saved there.

examples:
  moe-dist self-moe compose compose.yaml mixture
  moe-dist train router.yaml model.path=mixture 'trainable.include=["mixse_router.*"]'
  moe-dist self-moe compose compose.yaml joint compose.method=joint 'compose.experts={}' 'compose.skills=[math,code]'
  moe-dist train router.yaml model.path=joint 'trainable.include=["mixse_router.*","*.experts_*"]'
  moe-dist self-moe compose compose.yaml merged compose.method=ties compose.density=0.5
"""

import argparse

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="section compose: base, experts, method")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")


def run(args: argparse.Namespace) -> int:
    if environment.apply(local_rank=args.local_rank).world_size > 1:
        raise UserError("self-moe compose runs as one plain process")
    from moe_dist.methods.self_moe.composition.config import load_config

    config = load_config(args.config, args.overrides)
    from moe_dist.methods.self_moe.composition.compose import compose

    receipt = compose(config, args.out)
    print(receipt.render())
    print(f"wrote {args.out}")
    return EXIT_OK
