"""Make one model of a seed model and the dense models that were trained from it, one a domain.

nexus.method says what they become:
  nexus             the experts routed by their domains' embeddings, the seed's MLPs as an always-on shared expert
  linear            the same with a plain linear router
  btx               seed and experts routed, no shared expert, top 2
  sparse_upcycling  nexus.num_experts copies of the seed's MLPs, top 2
  dense_merging     the plain mean of all models: a dense model
Families: Llama, Mistral, Qwen2, Qwen3, Gemma, OLMo2. Reads and writes tensor by tensor; prints a receipt of which
tensor came from where and of what was measured, and leaves it in OUT as nexus_receipt.json.

examples:
  moe-dist nexus upcycle nexus.yaml upcycled nexus.domains=domains.safetensors
  moe-dist nexus upcycle nexus.yaml btx nexus.method=btx
"""

import argparse

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="section nexus: seed, experts, domains, method")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")


def run(args: argparse.Namespace) -> int:
    if environment.apply(local_rank=args.local_rank).world_size > 1:
        raise UserError("nexus upcycle runs as one plain process")
    from moe_dist.methods.nexus.config import load_config

    config = load_config(args.config, args.overrides)
    from moe_dist.methods.nexus.upcycle import upcycle

    receipt = upcycle(config, args.out)
    print(receipt.render())
    print(f"wrote {args.out}")
    return EXIT_OK
