"""Embed the domains: the mean of each one's documents in an embedder's space, centred over the domains.

CONFIG.yaml names the seed model (nexus.seed), the domains' text (data.train, one source a domain) and the embedder:
  nexus.embedder=seed                     the seed model's own hidden states; nothing else is needed
  nexus.embedder=FOLDER_OR_HUB_NAME       a sentence-embedding model in Hugging Face format
  nexus.embedder=VECTORS.safetensors      vectors of your own: a tensor [m] or [documents, m] under each domain's name,
                                          and `embedder` in the file's metadata
To add a domain later, embed it alone with nexus.same_space_as=OLD_FILE.

examples:
  moe-dist nexus embed nexus.yaml --out domains.safetensors
  moe-dist nexus embed new.yaml --out new.safetensors nexus.same_space_as=domains.safetensors
"""

import argparse

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="sections nexus and data")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")
    parser.add_argument("--out", required=True, metavar="FILE", help="domain file to write")


def run(args: argparse.Namespace) -> int:
    if environment.apply(local_rank=args.local_rank).world_size > 1:
        raise UserError("nexus embed runs as one plain process")
    from moe_dist.methods.nexus.config import load_config

    config = load_config(args.config, args.overrides)
    from moe_dist.methods.nexus.domains import embed
    from moe_dist.methods.nexus.report import render_domains
    from moe_dist.train.start import start_ranks

    domains = embed(config, device=start_ranks())
    domains.write(args.out)
    print(render_domains(domains))
    print(f"wrote {args.out}")
    return EXIT_OK
