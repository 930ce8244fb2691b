"""Held-out loss and perplexity of a model, for each domain of data.eval.

The first argument is a run folder, whose configuration and newest checkpoint are taken, or a CONFIG.yaml. A config
whose run folder holds a checkpoint is evaluated with it, otherwise the model as configured is.

examples:
  moe-dist eval runs/tiny
  moe-dist eval runs/tiny --weights runs/tiny/checkpoints/step-10
  moe-dist eval configs/debug/tiny.yaml run.name=elsewhere model.config=null model.path=exported
"""

import argparse
import json
from pathlib import Path

from moe_dist.config.checks import check_experts_only, check_layout
from moe_dist.config.load import load
from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="RUN_OR_CONFIG.yaml", help="run folder, or configuration with data.eval")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the configuration")
    parser.add_argument("--weights", metavar="RUN_OR_CHECKPOINT", help="take the weights from there")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE too")


def run(args: argparse.Namespace) -> int:
    source = Path(args.config)
    if source.is_dir():
        if not (source / "config.resolved.yaml").is_file():
            raise UserError(f"{source}: is no run folder (there is no config.resolved.yaml in it)")
        source /= "config.resolved.yaml"
    ranks = environment.apply(local_rank=args.local_rank)
    # One process holds all experts, over however many ranks the run had spread them; other axes serve training only.
    one = ("pipeline", "sequence", "tensor", *(["expert"] if ranks.launcher == "none" else []))
    config = load(source, [*(f"parallel.{name}=1" for name in one), *args.overrides])
    check_experts_only(config, "eval")
    check_layout(config, ranks.world_size)
    from moe_dist.train.finished import evaluate_run

    step, results = evaluate_run(config, weights=args.weights)
    if ranks.rank == 0:
        print(f"{'weights of step ' + str(step) if step is not None else 'the model as configured'}")
        print(f"{'domain':<24} {'loss':>8} {'perplexity':>12} {'tokens':>12}")
        for domain, figures in results.items():
            line = f"{figures['loss']:>8.4f} {figures['perplexity']:>12.2f} {figures['tokens']:>12,}"
            print(f"{domain:<24} {line}")
        if args.json:
            Path(args.json).write_text(json.dumps({"step": step, "domains": results}, indent=1) + "\n")
    return EXIT_OK
