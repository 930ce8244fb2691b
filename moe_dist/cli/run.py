"""Go through the stages of RECIPE.yaml. A stage that is done is skipped when the same command is given again.

examples:
  moe-dist run configs/quickstart.yaml
  moe-dist run configs/quickstart.yaml --dry-run      what would run, and what is done
  moe-dist run configs/quickstart.yaml --overwrite    from the start
"""

import argparse
import os

from moe_dist.cli.train import add_resume_arguments
from moe_dist.config.recipe import load_recipe
from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch.environment import derive
from moe_dist.launch.stages import describe, run_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="a list of stages")
    add_resume_arguments(parser)


def run(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.recipe)
    if derive(os.environ, local_rank=args.local_rank).world_size > 1:
        raise UserError("`run` starts the launchers of its stages itself: start it as one plain process")
    if args.resume not in ("auto", "never"):
        raise UserError(f"--resume {args.resume}: a recipe resumes stage by stage; give auto or never")
    if args.dry_run:
        print(describe(recipe))
        return EXIT_OK
    return run_recipe(recipe, resume=args.resume, overwrite=args.overwrite, report=lambda line: print(line, flush=True))
