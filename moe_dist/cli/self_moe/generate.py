"""Let a base model write its own training data: instructions first, then an answer to each.

CONFIG.yaml names the model and a seed file for each skill, about a hundred lines like
  {"instruction": "...", "input": "...", "output": "..."}          (input may be absent)
Instructions are brainstormed from three seeds at a time, sampled; answers are greedy, with five seed pairs in context.
What fails the filters is counted and left out, until each skill has generate.count records or generate.max_prompts is
reached. OUT/SKILL.jsonl then holds conversations that `moe-dist train` reads, with where each record comes from.

On several ranks each has a whole model, and the records are the same. The same command again goes on where a run was
interrupted. Prompts are files: start from one of moe_dist/methods/self_moe/generation/prompts, and name yours in
generate.prompts.

examples:
  moe-dist self-moe generate generate.yaml generated
  moe-dist self-moe generate generate.yaml generated generate.model=google/gemma-7b generate.count=100
  torchrun --nproc-per-node 4 -m moe_dist self-moe generate generate.yaml generated
"""

import argparse
import sys

from moe_dist.errors import EXIT_OK
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="sections generate and filters")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")
    parser.add_argument("--overwrite", action="store_true", help="remove what OUT holds of an earlier run")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")


def run(args: argparse.Namespace) -> int:
    ranks = environment.apply(local_rank=args.local_rank)
    from moe_dist.methods.self_moe.generation.config import load_config

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        if ranks.rank == 0:
            from moe_dist.methods.self_moe.generation.plan import describe

            print("\n".join(describe(config, args.out)))
        return EXIT_OK
    from moe_dist.methods.self_moe.generation.generate import generate
    from moe_dist.train.start import start_ranks

    return generate(
        config,
        args.out,
        device=start_ranks(),
        overwrite=args.overwrite,
        say=lambda line: print(line, flush=True),
        terminal=sys.stdout.isatty(),
    )
