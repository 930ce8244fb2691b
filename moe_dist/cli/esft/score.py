"""Score the experts of every layer by how much a task uses them.

Runs the model of a CONFIG.yaml over a sample of its data.train, or reads the router logs of the ESFT repository.
Writes a summary.json as that repository does, with what it lacks (tokens, counts, gate mass of each layer,
fingerprints of model and data) under a key of its own.

examples:
  moe-dist esft score configs/debug/tiny.yaml --tokens 4096 --out summary.json
  torchrun --nproc-per-node 2 -m moe_dist esft score config.yaml parallel.expert=2 --out summary.json
  moe-dist esft score --logs expert_scores/intent --top-k 6 --experts 64 --out summary.json
"""

import argparse

from moe_dist.config.checks import check_experts_only, check_layout
from moe_dist.config.load import load
from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="model and data.train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")
    parser.add_argument("--out", required=True, metavar="FILE", help="summary.json to write")
    parser.add_argument("--tokens", type=int, metavar="N", help="size of the sample (131072)")
    parser.add_argument(
        "--score-norm",
        choices=("per_token", "per_sequence"),
        default="per_token",
        help="mean over all tokens (default), or over the tokens of each sequence first",
    )
    parser.add_argument(
        "--count-tokens",
        choices=("no_pad", "labels_only"),
        default="no_pad",
        help="every token but padding (default), or labels alone, as the answers of a chat are",
    )
    parser.add_argument("--logs", metavar="DIR", help="read router logs in place of running a model")
    parser.add_argument("--top-k", type=int, metavar="K", help="with --logs: experts of a token")
    parser.add_argument("--experts", type=int, metavar="E", help="with --logs: experts of a layer")


def run(args: argparse.Namespace) -> int:
    ranks = environment.apply(local_rank=args.local_rank)
    summary = _from_logs(args) if args.logs is not None else _from_model(args, ranks)
    if ranks.rank == 0:
        from moe_dist.config.expert_files import write_summary

        write_summary(args.out, summary)
        extra = summary.extra
        print(
            f"scored {len(extra['token_counts'])} layers by {extra['tokens']:,} tokens in {extra['sequences']:,} "
            f"sequences; a token's weights add up to {min(extra['gate_mass'].values()):.4f} to "
            f"{max(extra['gate_mass'].values()):.4f}"
        )
        print(f"wrote {args.out}")
    return EXIT_OK


def _from_logs(args: argparse.Namespace):
    if args.config is not None or args.tokens is not None or args.count_tokens != "no_pad":
        raise UserError("--logs: all that was logged is counted; it takes no CONFIG.yaml, --tokens or --count-tokens")
    if not (args.top_k and args.top_k > 0 and args.experts and args.experts > 0):
        raise UserError(
            "--logs needs --top-k and --experts, which the logs do not tell (for DeepSeek-V2-Lite 6 and 64)"
        )
    from moe_dist.methods.esft.score import score_logs

    return score_logs(args.logs, top_k=args.top_k, num_experts=args.experts, score_norm=args.score_norm)


def _from_model(args: argparse.Namespace, ranks):
    if args.top_k is not None or args.experts is not None:
        raise UserError("--top-k and --experts are for --logs; a model knows its own")
    if args.config is None:
        raise UserError("esft score needs a CONFIG.yaml with the model and the task's data.train, or --logs DIR")
    config = load(args.config, args.overrides)
    check_experts_only(config, "esft score")
    check_layout(config, ranks.world_size)
    from moe_dist.methods.esft.score_run import SAMPLE_TOKENS, score_run

    return score_run(
        config,
        tokens=SAMPLE_TOKENS if args.tokens is None else args.tokens,
        score_norm=args.score_norm,
        count_tokens=args.count_tokens,
    )
