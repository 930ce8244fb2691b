"""For batch scripts, after the ranks: ends with 85 or 86 where the run is to be started again, else with its own code.

Started again is a run that was stopped after a save (85) or met a passing failure (86), if it has made a step since its
last start and has not failed too often in a row; where it has not, this ends with 87.
"""

import argparse

from moe_dist.launch.chain import again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--code", type=int, required=True, metavar="N", help="exit code of the launcher")


def run(args: argparse.Namespace) -> int:
    return again(args.run, code=args.code)
