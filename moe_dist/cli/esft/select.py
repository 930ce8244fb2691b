"""Choose the experts of each layer that train: highest scores first, until they add up to p.

Reads a summary.json and writes an expert config, both in the format of the ESFT repository. How the choice was made
(scores, p, control, seed) is written beside it, as NAME.selection.json.

examples:
  moe-dist esft select --scores summary.json --kind token --p 0.2 --out expert_config.json
  moe-dist esft select --scores summary.json --kind gate --p 0.3 --p-mode fraction_of_mass --out expert_config.json
  moe-dist esft select --scores summary.json --p 0.2 --control random --seed 1 --out random.json
  moe-dist esft select --scores law.json --compare intent.json --out law_config.json --plots plots
"""

import argparse
from pathlib import Path

from moe_dist.errors import EXIT_OK, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scores", required=True, metavar="FILE", help="summary.json with the scores of the task")
    parser.add_argument("--out", required=True, metavar="FILE", help="expert config to write")
    parser.add_argument("--kind", choices=("token", "gate"), default="token", help="scores to go by (token)")
    parser.add_argument("--p", type=float, help="what they must add up to (0.2 for token, 0.1 for gate scores)")
    parser.add_argument(
        "--p-mode",
        choices=("absolute", "fraction_of_mass"),
        default="absolute",
        help="p itself (default), or p times the layer's sum of scores",
    )
    parser.add_argument(
        "--control",
        choices=("none", "random", "least_used"),
        default="none",
        help="as many experts of each layer, but others: drawn at random, or the lowest scores",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --control random (0)")
    parser.add_argument("--shared-experts", action="store_true", help="train shared experts too")
    parser.add_argument("--non-expert-modules", action="store_true", help="train everything but experts too")
    parser.add_argument("--plots", metavar="DIR", help="figures there, each with its numbers as CSV beside it")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="FILE", help="summaries of other tasks, for --plots"
    )


def run(args: argparse.Namespace) -> int:
    if args.compare and args.plots is None:
        raise UserError("--compare is for --plots DIR")
    from moe_dist.config.expert_files import read_summary, write_expert_config
    from moe_dist.config.strict_json import write_json
    from moe_dist.methods.esft.selection import choose, render

    summary = read_summary(args.scores)
    others = {name: read_summary(name) for name in args.compare}
    choice = choose(
        summary.of_kind(args.kind, where=args.scores),
        kind=args.kind,
        p=args.p,
        p_mode=args.p_mode,
        control=args.control,
        seed=args.seed,
        shared_experts=args.shared_experts,
        non_expert_modules=args.non_expert_modules,
    )
    if args.plots is not None:
        from moe_dist.methods.esft.figures import selection_plots
        from moe_dist.report.files import plot_files, write_files

        plots = selection_plots({args.scores: summary, **others}, choice, kind=args.kind)
        write_files(args.plots, {name: content for plot in plots for name, content in plot_files(plot).items()})
    out = Path(args.out)
    write_json(out.with_name(f"{out.stem}.selection.json"), {"scores": args.scores, **choice.record})
    write_expert_config(out, choice.config)
    print(render(choice))
    print(f"wrote {out}" + (f", figures in {args.plots}" if args.plots else ""))
    return EXIT_OK
