"""Prove that the layout of CONFIG.yaml trains your model as one plain process would, before you spend a cluster on it.

Your own checkpoint is cut to a few layers (one of each kind; all experts of these stay) and trained for three steps
exactly as the config says: axes, ZeRO stage, bucket sizes, dispatcher, wire, recomputation, balance losses, what trains
and what is frozen. Beside it one process of plain transformers and torch does the same. Compared are: logits, the
experts that each token chose, losses, every gradient (per expert), the clip norm, weights after three steps; that what
is frozen has not changed by a bit; and that a step after a checkpoint is, to the bit, the one without.

  0  all of it holds: `PROVED`
  1  something is off; the worst tensors are named, with their layers in your model
  2  the config or the model cannot be run at all

Both sides compute in float32, also where the config says bf16: rounding would hide what is looked for. What is allowed
are relative errors of 2e-6 (weights: 1e-5). A run in bf16 is then tried in bf16 as well, as far as rounding lets one
see: no gradient is doubled, averaged or left unsummed. `certificate.json` has every figure.

Without a launcher the ranks are processes of this machine's CPU, as many as the config needs or --ranks says; so the
layout of 64 GPUs can be proved on none, if the memory suffices. Under a launcher its ranks are taken.

examples:
  moe-dist prove configs/debug/tiny.yaml
  moe-dist prove configs/debug/tiny.yaml --ranks 4 parallel.expert=2 parallel.zero_stage=2
  moe-dist prove my.yaml --layers 0,3 --out proofs/ep8
  torchrun --nproc-per-node 8 -m moe_dist prove my.yaml
"""

import argparse
import os
from pathlib import Path

from moe_dist.config.checks import check_layout, check_world, smallest_world
from moe_dist.config.load import load
from moe_dist.errors import EXIT_NOT_PROVED, EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="without a launcher: how many to start here; parallel.world_size or the fewest that the layout needs",
    )
    parser.add_argument("--layers", metavar="0,3,..", help="layers of the model to keep; one of each kind when absent")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the certificate; <run.dir>-proof when absent")
    parser.add_argument("--keep", action="store_true", help="leave the cut model and the plain process' tensors in OUT")
    parser.add_argument(
        "--timeout", type=float, default=3600.0, metavar="SECONDS", help="for the ranks started here (3600)"
    )


def run(args: argparse.Namespace) -> int:
    if args.ranks is not None and args.ranks < 1:
        raise UserError(f"--ranks {args.ranks}: at least 1")
    config = load(args.config, args.overrides)
    layers = None if args.layers is None else _numbers(args.layers)
    ranks = environment.derive(dict(os.environ), local_rank=args.local_rank)
    if ranks.launcher != "none" and args.ranks not in (None, ranks.world_size):
        raise UserError(f"--ranks {args.ranks}: the launcher has started {ranks.world_size}; leave it out")
    world = ranks.world_size
    if ranks.launcher == "none":
        world = args.ranks or config.parallel.world_size or smallest_world(config)
    check_world(config, world)
    check_layout(config, world)
    if world > 1 and ranks.launcher == "none":
        from moe_dist.prove.start import start_here

        return start_here(_words(args), world, timeout=args.timeout)
    environment.apply(local_rank=args.local_rank)
    from moe_dist.prove.proof import prove

    out = args.out or Path(f"{config.run.dir}-proof")
    certificate = prove(config, out, layers=layers, keep=args.keep)
    if ranks.rank == 0:
        print(certificate.text(), flush=True)
        print(f"written to {out / 'certificate.json'}", flush=True)
    return EXIT_OK if certificate.holds else EXIT_NOT_PROVED


def _words(args: argparse.Namespace) -> list[str]:
    """The command line of one rank."""
    options = [("--layers", args.layers), ("--out", args.out)]
    given = [word for name, value in options if value is not None for word in (name, str(value))]
    return ["prove", args.config, *args.overrides, *given, *(["--keep"] if args.keep else [])]


def _numbers(text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UserError(f"--layers {text}: has to be numbers of layers, as in 0,3")
    return [int(part) for part in text.split(",")]
