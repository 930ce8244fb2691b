"""Evaluate a model on held-out items: the answer by exact match, or a program by running it (pass@1).

CONFIG.yaml names the model (a Hugging Face folder, or that of a mixture, or a base and evaluate.adapter) and the sets,
JSONL files with lines like
  {"instruction": "What is 3 + 4?", "output": "7"}                 metric exact_match; output may be a list
  {"instruction": "Write f(x) that doubles x.", "test": "assert f(2) == 4"}                  metric pass_at_1
Responses are greedy. Programs run locked down, see docs/self_moe.md. Overlap of the sets with seeds and training data
(evaluate.seen) is measured first. OUT gets one file a set, with every response, and results.json; for a mixture also
which expert the tokens of each set go to. On several ranks the figures are the same.

harness.tasks calls lm-evaluation-harness on the same model, on one process (pip install 'moe_dist[eval]').

examples:
  moe-dist self-moe evaluate evaluate.yaml results/mixture evaluate.model=mixture
  moe-dist self-moe evaluate evaluate.yaml results/math evaluate.adapter=experts/math evaluate.sets.math.limit=100
  torchrun --nproc-per-node 4 -m moe_dist self-moe evaluate evaluate.yaml results/mixture
  moe-dist self-moe evaluate configs/self_moe/lm-eval.yaml results/lm-eval evaluate.model=mixture
"""

import argparse
from pathlib import Path

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="sections evaluate and harness")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")
    parser.add_argument("--dry-run", action="store_true", help="check everything but the model, and stop")


def run(args: argparse.Namespace) -> int:
    ranks = environment.apply(local_rank=args.local_rank)
    out = Path(args.out).expanduser()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} already exists and is not empty; give a new folder or remove it first")
    from moe_dist.methods.self_moe.evaluation.config import load_config

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        if ranks.rank == 0:
            from moe_dist.methods.self_moe.evaluation.plan import describe

            print("\n".join(describe(config)))
        return EXIT_OK
    if config.harness.tasks:
        from moe_dist.methods.self_moe.evaluation.harness import check_harness

        check_harness(config.harness, ranks=ranks.world_size)
    from moe_dist.methods.self_moe.evaluation import report
    from moe_dist.methods.self_moe.evaluation.evaluate import evaluate, open_model
    from moe_dist.train.start import start_ranks

    first = ranks.rank == 0
    model = open_model(config.evaluate, start_ranks())
    found = evaluate(config, model, say=(lambda line: print(line, flush=True)) if first else None)
    tree = report.summary(config, found)
    if config.harness.tasks:
        from moe_dist.methods.self_moe.evaluation.harness import run_harness

        tree["harness"] = run_harness(config.harness, model)
    if first:
        report.write(out, tree, found)
        print(report.render(tree))
        print(f"wrote {out}")
    return EXIT_OK
